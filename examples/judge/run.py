"""Run of `config.yaml` with a judge of its own: a tiny model that tells equal answers, behind an SGLang server.

    python -m examples.judge.run [OVERRIDE ...]

A real judge is a larger model: `python -m sglang.launch_server --model-path MODEL --port 30000`, or a service.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from roll_r3.config.engine_role import engine_role
from roll_r3.config.load import load
from roll_r3.data.tiny_task import Example
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import EnginePlace

_KEY = "JUDGE_API_KEY"
CONFIG = Path(__file__).with_name("config.yaml")
_OTHER = ("", "12", "+", "3+", "=")
"""Responses that are no digit."""


def questions() -> list[Example]:
    """Return (question, verdict) of all pairs of digits, half of them equal, and of other responses."""
    digits = [str(digit) for digit in range(10)]
    equal = [(f"{digit}={digit}?", "YES") for digit in digits] * 9
    other = [(f"{a}={b}?", "NO") for a in [*digits, *_OTHER] for b in digits if a != b]
    return equal + other


async def run(overrides: list[str], folder: Path) -> int:
    """Serve the judge while the run goes on; return the run's exit code."""
    checkpoint = make_tiny_checkpoint(folder / "judge", seed=1, examples=questions(), warm_start_steps=300, head_dim=32)
    config = load(CONFIG, [f"pretrain={checkpoint}"]).config
    server = SglangRollout(engine_role(config), EnginePlace(0, "cpu", (), folder / "judge.log"))
    try:
        await server.start()
        target = server.weight_target()
        judge = "rewards.judged.judge"
        address = (f"{judge}.base_url=http://{target.host}:{target.port}/v1", f"{judge}.api_key_env={_KEY}")
        command = [sys.executable, "-m", "roll_r3.run", "--config", str(CONFIG), *address, *overrides]
        environment = os.environ | {_KEY: target.api_key}
        return await asyncio.to_thread(subprocess.call, command, env=environment)
    finally:
        await server.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(asyncio.run(run(sys.argv[1:], Path(name))))
