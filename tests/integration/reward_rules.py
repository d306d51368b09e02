"""Reward rules with the faults that a user's rule may have."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil


def misbehaves(response: str, ground_truth: str, folder: str = "") -> object:
    """Follow the response: a number is the score, words are faults. Children write their id to `folder`."""
    match response.split():
        case ["environment", name]:
            return float(os.environ[name])
        case ["oom"]:
            return int(Path("/proc/self/oom_score_adj").read_text())
        case ["raise", *words]:
            raise ValueError(" ".join(words))
        case ["loop"]:
            while True:
                pass
        case ["sleep"]:
            time.sleep(3600)
        case ["child"]:
            with subprocess.Popen(["sleep", "3600"]) as child:
                (Path(folder) / "child").write_text(str(child.pid))
                child.wait()
        case ["fork"]:  # the copy holds every open file of this process
            if os.fork() == 0:
                time.sleep(3600)
            os._exit(3)
        case ["exit", code]:
            os._exit(int(code))
        case ["quit"]:
            sys.exit("enough")
        case ["segfault"]:
            ctypes.string_at(0)
        case ["late", "death"]:  # with a copy that holds every open file
            if os.fork() == 0:
                time.sleep(3600)
            threading.Timer(0.2, os._exit, (9,)).start()
            return 1.0
        case ["print", size]:
            print("x" * int(size))
            print("y" * int(size), file=sys.stderr)
            return 1.0
        case ["long"]:
            raise ValueError("z" * 10**7)
        case ["return", "list"]:
            return [0.0] * 10**6
        case ["return", what]:
            return {"None": None, "nan": float("nan"), "text": "1.0"}[what]
        case ["seconds", seconds]:
            time.sleep(float(seconds))
            return float(seconds)
        case ["pid"]:
            return os.getpid()
    return float(response)


PLAN = {5: "raise no such luck", 50: "loop", 95: "segfault", 200: "1e39"}
"""Faults of `falls_over` by call; 1e39 is a float, but its advantage overflows 32 bits."""


def falls_over(response: str, ground_truth: str, folder: str) -> object:
    """Compare with the ground truth, except at the calls of `PLAN`."""
    with (Path(folder) / "calls").open("a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write("x")
        calls.flush()
        number = calls.tell()
    if number == 1:
        (Path(folder) / "oom_scores").write_text(" ".join(_oom_scores()))
    planned = PLAN.get(number)
    return float(response.strip() == ground_truth) if planned is None else misbehaves(planned, ground_truth)


ACTORS = ("ray::ModelWorker", "ray::RolloutWorker")


def _oom_scores() -> list[str]:
    """Return the kernel's oom_score_adj of each rank and rollout worker of this run; higher ones are killed first."""
    children = psutil.Process(os.getppid()).children(recursive=True)
    workers = [child for child in children if "".join(child.cmdline()).startswith(ACTORS)]
    return [Path(f"/proc/{worker.pid}/oom_score_adj").read_text().strip() for worker in workers]


def forks(response: str, ground_truth: str, how: str) -> float:
    """Return the response as a number; a fork returns too, with another number or an error."""
    copy = os.fork()
    if copy == 0:
        if how == "exits":
            sys.exit(3)
        if how == "raises":
            raise ValueError("in a copy")
        return 1000 + float(response)
    time.sleep(0.005)
    if how == "exits":
        assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 3
    return float(response)


_imported = False


def imports_late(response: str, ground_truth: str, seconds: float) -> float:
    """Import much in the first call; a response "loop" never ends."""
    global _imported
    if not _imported:
        time.sleep(seconds)
        _imported = True
    while response == "loop":
        pass
    if response == "exit":
        os._exit(3)
    return float(response)


def passes_tests(response: str, row: dict[str, Any], *, messages: list[dict[str, str]], finish_reason: str) -> float:
    """Return the share of the row's test cases passed by the response, a number; 0 if truncated."""
    assert [set(message) for message in messages] == [{"role", "content"}]
    if finish_reason == "length":
        return 0.0
    tests = row["tests"]
    return sum(float(response) > test["above"] for test in tests) / len(tests)


def needs_more(response: str, solution: str, letter: str, *, row: dict[str, Any]) -> float:
    """Rule with the required parameter `letter`."""
    return 0.0
