"""`nothing_left` finds hidden and orphaned processes, ports, and shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from faults import nothing_left
from leftovers import POLL_SECONDS, POLLS_PER_MEMORY_POLL, Descendants

TITLED = "from ray._raylet import setproctitle; setproctitle('ray::hidden'); print(flush=True); "
LISTENS = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(flush=True); "
SLEEPS = "import time; time.sleep(60)"


def start(program: str, *prefix: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*prefix, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def started(program: str, *prefix: str) -> subprocess.Popen[str]:
    """Return the process after it has written a line."""
    process = start(program, *prefix)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process


def within(body: Callable[[Descendants], object], grace: float = 0) -> Descendants:
    """Return the descendants of an ended block."""
    with nothing_left(grace) as descendants:
        body(descendants)
    return descendants


def test_what_ends_in_time_is_not_left():
    within(lambda _: start("import time; time.sleep(1)"), grace=10)


def test_an_orphan_with_a_port_is_found_and_ended():
    found: list[int] = []

    def body(descendants: Descendants) -> None:
        shell = started(LISTENS + SLEEPS, "sh", "-c", '"$0" "$@" &')
        shell.wait()
        found.extend(descendants.alive())

    with pytest.raises(AssertionError, match=r"process \d+ \(.*\), listens on port \d+"):
        within(body)
    assert len(found) == 1
    assert not Path(f"/proc/{found[0]}").exists() or "Z" in Path(f"/proc/{found[0]}/stat").read_text()


def test_one_that_overwrites_its_environment_is_found():
    def body(descendants: Descendants) -> None:
        started("import time; time.sleep(1); " + TITLED + SLEEPS)

    with pytest.raises(AssertionError, match="ray::hidden"):
        within(body)


@pytest.mark.parametrize("kind", ["open", "mapped"])
def test_shared_memory_is_left_when_nobody_has_it(kind):
    name = f"/dev/shm/roll_r3_test_{os.getpid()}"
    hold = f"import mmap; f = open('{name}', 'w+b'); f.truncate(64); print(flush=True); "
    if kind == "mapped":
        hold += "m = mmap.mmap(f.fileno(), 64); f.close(); "
    others = SharedMemory(create=True, size=64)

    def body(_: Descendants) -> None:
        process = started(hold + SLEEPS)
        time.sleep(2 * POLL_SECONDS * POLLS_PER_MEMORY_POLL)
        process.kill()
        process.wait()

    try:
        with pytest.raises(AssertionError) as found:
            within(body)
        assert str(found.value).splitlines()[1:] == [f"shared memory {name}"]
    finally:
        os.unlink(name)
        others.close()
        others.unlink()


def test_memory_that_somebody_has_is_not_left():
    name = f"roll_r3_test_{os.getpid()}"
    with nothing_left(0):
        held = SharedMemory(name, create=True, size=64)
        process = started(f"import mmap; f = open('/dev/shm/{name}', 'r+b'); print(flush=True); " + SLEEPS)
        time.sleep(2 * POLL_SECONDS * POLLS_PER_MEMORY_POLL)
        process.kill()
        process.wait()
    held.close()
    held.unlink()


def test_a_blocks_own_error_is_the_one_that_is_seen():
    processes = []

    def body(_: Descendants) -> None:
        processes.append(start(SLEEPS))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        within(body)
    assert processes[0].wait(5) != 0


def test_an_inner_blocks_processes_are_the_outer_ones_too():
    with nothing_left(0) as outer, nothing_left(0):
        process = start(SLEEPS)
        time.sleep(0.1)
        assert outer.alive() == [process.pid]
        process.kill()
        process.wait()


def test_others_are_not_found():
    other = start(SLEEPS)
    try:
        with nothing_left(0) as descendants:
            assert descendants.alive() == []
    finally:
        other.kill()
        other.wait()
