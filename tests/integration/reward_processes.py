"""Helpers for tests of reward processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from roll_r3.config.rewards import RewardConfig
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Rewards

LIMIT = 1.0
MISBEHAVES = "reward_rules:misbehaves"

Open = Callable[..., Rewards]


@pytest.fixture
def rewards(tmp_path: Path) -> Iterator[Open]:
    """Start rules in their processes, and check at the end that no process is left."""
    with ExitStack() as stack:

        def opened(rule: str = MISBEHAVES, *, workers: int = 2, max_failed: float = 1.0, **fields: Any) -> Rewards:
            rules = {"mine": RewardConfig(**{"reward": rule, "timeout": LIMIT} | fields)}
            found = stack.enter_context(Rewards(rules, workers=workers, max_failed=max_failed, log_dir=tmp_path))
            found.wait_until_ready()
            return found

        yield opened
    deadline = time.monotonic() + 5.0  # the kernel may take a moment on a busy machine
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []


def alive(log_dir: Path) -> list[str]:
    """Return the running processes with their output in the rules' logs."""
    left = []
    for process in psutil.process_iter():
        try:
            files = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)}
        except OSError:
            continue
        if any(Path(file).parent == log_dir for file in files):
            left.append(" ".join(process.cmdline()))
    return left


def asked(text: str, truth: str = "", domain: str = "default", **fields: Any) -> Response:
    """Return a response with default values."""
    known: dict[str, Any] = {"prompt": "", "messages": (), "row": {}, "finish_reason": "stop", "num_response_tokens": 1}
    return Response(text, truth, domain, **known | fields)


def score(rewards: Rewards, *texts: str) -> list[float | None]:
    return rewards.score([asked(text) for text in texts]).scores


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
