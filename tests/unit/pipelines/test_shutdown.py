"""SIGTERM, really sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psutil
import pytest

from roll_r3.pipelines.lifecycle.shutdown import EXIT_STATUS, GracefulExit, ImmediateExit, Shutdown


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_leaves_at_once_where_nothing_is_held():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    with pytest.raises(GracefulExit) as raised, Shutdown(60):
        sigterm()
    assert raised.value.code == EXIT_STATUS == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), "nothing rings afterwards"


def held(*actions: Callable[[], object], grace_s: float = 60) -> None:
    """Run these actions while shutdown is held back, then check that the process exits."""
    with Shutdown(grace_s) as shutdown:
        with shutdown.held():
            for action in actions:
                action()
        pytest.fail("it did not leave")


def test_what_is_held_is_finished_first():
    done: list[str] = []
    with pytest.raises(GracefulExit):
        held(sigterm, lambda: done.append("the step"))
    assert done == ["the step"]


def test_what_is_saved_afterwards_is_held_too():
    done: list[str] = []

    def leave() -> None:
        with Shutdown(60) as shutdown:
            try:
                sigterm()
            except GracefulExit:
                with shutdown.held():
                    done.append("saved")

    with pytest.raises(GracefulExit):
        leave()
    assert done == ["saved"]


def test_an_error_of_what_is_held_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        held(sigterm, lambda: 1 / 0)


def test_the_grace_period_ends_what_is_held():
    start = time.monotonic()
    with pytest.raises(ImmediateExit):
        held(sigterm, lambda: time.sleep(30), grace_s=0.05)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("grace_s", "rings_after"), [(300.0, 285.0), (20.0, 10.0)])
def test_time_is_kept_back_to_take_things_down(grace_s: float, rings_after: float):
    seconds: list[float] = []
    with pytest.raises(GracefulExit):
        held(sigterm, lambda: seconds.append(signal.getitimer(signal.ITIMER_REAL)[0]), grace_s=grace_s)
    assert seconds[0] == pytest.approx(rings_after, abs=2.0)


def test_a_second_one_waits_for_nothing():
    with pytest.raises(ImmediateExit):
        held(sigterm, sigterm)


def interrupted() -> None:
    """Raise as a waiting call of Ray does: a SystemExit other than the handler's."""
    try:
        sigterm()
    except SystemExit:
        raise SystemExit(1) from None


def test_what_was_raised_comes_out_of_a_call_that_replaced_it():
    with pytest.raises(GracefulExit) as raised, Shutdown(60) as shutdown, shutdown.as_raised():
        interrupted()
    assert raised.value.code == EXIT_STATUS
    with pytest.raises(GracefulExit), Shutdown(60):
        interrupted()
    with pytest.raises(ImmediateExit):
        held(sigterm, interrupted)


def test_an_exit_without_a_signal_stays_as_it_is():
    with pytest.raises(SystemExit) as raised, Shutdown(60) as shutdown, shutdown.as_raised():
        raise SystemExit(3)
    assert raised.value.code == 3


def test_what_must_not_be_broken_is_left_at_its_end():
    done: list[str] = []

    def leave() -> None:
        with Shutdown(60) as shutdown:
            with shutdown.unbroken():
                sigterm()
                done.append("all members were called")
            pytest.fail("it did not leave")

    with pytest.raises(GracefulExit):
        leave()
    assert done == ["all members were called"]


def test_what_takes_things_down_is_not_left_a_second_time():
    with Shutdown(60) as shutdown:
        with pytest.raises(GracefulExit):
            sigterm()
        with shutdown.unbroken():
            pass
        with pytest.raises(GracefulExit), shutdown.held(), shutdown.unbroken():
            pass


def test_what_must_not_be_broken_within_what_is_held_ends_with_that():
    done: list[str] = []

    def unbroken(shutdown: Shutdown) -> None:
        with shutdown.unbroken():
            sigterm()
        done.append("the step goes on")

    def leave() -> None:
        with Shutdown(60) as shutdown, shutdown.held():
            unbroken(shutdown)

    with pytest.raises(GracefulExit):
        leave()
    assert done == ["the step goes on"]


def test_other_threads_hold_nothing():
    """Hold from a thread, as a writer of checkpoints does at any time."""
    with Shutdown(60) as shutdown, ThreadPoolExecutor(1) as pool:
        held = Event()

        def call() -> None:
            with shutdown.unbroken():
                held.set()
                time.sleep(0.3)

        pool.submit(call)
        assert held.wait(10)
        with pytest.raises(GracefulExit):
            sigterm()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_whose_exception_python_ignored_is_raised_again() -> None:
    """A finaliser, like a callback around a fork, raises nothing into the code that it interrupts."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with Shutdown(60) as shutdown:
        shutdown.raise_if_asked()
        one = Finalised()
        del one
        assert shutdown.asked
        with pytest.raises(GracefulExit):
            shutdown.raise_if_asked()


def test_nothing_happens_without_one():
    with Shutdown(60) as shutdown, shutdown.held():
        pass


def test_a_terminal_that_goes_away_ends_nothing_nor_what_is_started() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Shutdown(60):
        os.kill(os.getpid(), signal.SIGHUP)
        child = subprocess.run(["sh", "-c", "kill -HUP $$; echo alive"], capture_output=True, text=True, check=False)
    assert child.stdout == "alive\n"
    assert signal.getsignal(signal.SIGHUP) == before


HANGS = """
import ctypes, os, signal, subprocess, sys, threading
from roll_r3.pipelines.lifecycle import shutdown
shutdown.LATE_S = 0.5
libc = ctypes.CDLL(None)
with shutdown.Shutdown(float(sys.argv[1])):
    child = subprocess.Popen(["sleep", "100"])
    os.kill(child.pid, signal.SIGSTOP)
    locked = ctypes.create_string_buffer(64)  # a mutex, taken twice: a wait that no signal ends
    libc.pthread_mutex_lock(locked)
    print(child.pid, flush=True)
    libc.pthread_mutex_lock(locked)
"""


@pytest.mark.parametrize(
    ("grace_s", "signals", "least", "most", "status"),
    [
        (3.0, [signal.SIGTERM], 3.0, 7.0, 143),
        (6.0, [signal.SIGTERM, signal.SIGTERM], 3.0, 6.0, 143),
        (1.0, [signal.SIGINT, signal.SIGINT], 0.5, 4.0, 130),
    ],
    ids=["SIGTERM", "a second SIGTERM", "Ctrl-C twice"],
)
def test_a_process_that_hangs_in_a_library_is_ended_with_what_it_started(
    grace_s: float, signals: list[signal.Signals], least: float, most: float, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(grace_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    time.sleep(0.3)  # it hangs by now
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert least <= time.monotonic() - began <= most
    assert "the run did not end in time, so its processes are killed" in said
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
