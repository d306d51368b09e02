"""Reward rules that do what a user's may do."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def misbehaves(response: str, ground_truth: str, folder: str = "") -> object:
    """What the response says: a number is the score. Whatever it starts writes its id to `folder`."""
    match response.split():
        case ["environment", name]:
            return float(os.environ[name])
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
        case ["late", "death"]:  # and a copy that holds every open file
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
"""What `falls_over` does at its n-th call; 1e39 is a float, but an advantage of it is none of 32 bits."""


def falls_over(response: str, ground_truth: str, folder: str) -> object:
    """Whether it is the ground truth, except at the calls of `PLAN`."""
    with (Path(folder) / "calls").open("a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write("x")
        calls.flush()
        number = calls.tell()
    planned = PLAN.get(number)
    return float(response.strip() == ground_truth) if planned is None else misbehaves(planned, ground_truth)
