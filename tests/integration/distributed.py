"""Real processes for tests: a gang of ranks stays up, runs one function after another, and never hangs a test.

A test gives a module-level function. Every rank calls it with its own `ProcessInfo`; results come back in rank order.
Each call has a new store, so the function may join a world. A rank's exception, death or late answer ends the gang,
and the next call starts a new one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers.world import host_store

GRACE = 5.0
"""Seconds for the other ranks after a failure of one: they may wait for it in a collective call."""


class RankFailed(AssertionError):
    """Failure of one or more ranks; the text holds their tracebacks."""


class Gang:
    """`size` processes on this machine, forked at the first call from one process per test session.

    That process has already imported the trainers (see `warm`): a rank starts in milliseconds instead of 5 to 15 s.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Run `function(process, *args)` on every rank.

        Raises:
            RankFailed: a rank raised, died, or did not return within `timeout` seconds.
        """
        if not self._processes:
            self._start()
        store = host_store("127.0.0.1")
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, ProcessInfo(rank, self.size, rank, "127.0.0.1", store.port), args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.size:
            waiting = [rank for rank in range(self.size) if rank not in results and rank not in failures]
            ready = wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(waiting, "no answer in time")
            for rank in waiting:
                if self._pipes[rank] in ready:
                    self._receive(rank, results, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self.close()
            raise RankFailed("\n".join(f"rank {rank} of {self.size}:\n{text}" for rank, text in failures.items()))
        return [results[rank] for rank in range(self.size)]

    def _receive(self, rank: int, results: dict[int, Any], failures: dict[int, str]) -> None:
        try:
            ok, answer = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(1.0)
            failures[rank] = f"died with exit code {self._processes[rank].exitcode}"
            return
        (results if ok else failures)[rank] = answer

    def _start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm"])
        for _ in range(self.size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def close(self) -> None:
        """End the processes; safe to call twice."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection) -> None:
    """Call functions and answer, until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, process, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(process, *args))
        except BaseException:  # noqa: BLE001  pytest's own errors are not Exceptions
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        del function, process, args, answer
        gc.collect()  # process groups in reference cycles keep their threads and sockets
