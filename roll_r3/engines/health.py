"""Health of one server: its exit, its silence, and useless answers. No engine is named here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from roll_r3.config.strategies import ServerConfig
from roll_r3.engines.burst import Burst
from roll_r3.engines.process import ServerProcess
from roll_r3.errors import EngineError
from roll_r3.strategies.base import GenerateResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_S = 1.0
"""Seconds between a dying server's first failed request and the latest sight of its exit."""
_QUESTIONS = 3
"""Number of unanswered probes in a row before a server counts as hung. One is too few: this process may itself have
been stopped during a probe."""
_PAUSE_S = 5.0
"""Seconds between an answer and the next probe."""
_REFUSED_S = 1.0
"""Seconds between a refusal (it may come at once) and the next probe."""

Probe = Callable[[float], Awaitable[bool]]
"""Request for a sign of life, with a timeout in seconds. The generating part of the server must give it, between any
two of its batches: then a working engine is never silent for longer than one batch takes, however long its queue."""
Sleep = Callable[[float], Awaitable[None]]


class Health:
    """Health of one server, from its launch to its end."""

    def __init__(self, name: str, process: ServerProcess, settings: ServerConfig) -> None:
        self._name = name
        self._process = process
        self._settings = settings
        self._verdict = ""

    def why_down(self) -> str:
        """Return why no more requests go to this server, with the end of its log; empty while they do."""
        if not self._verdict and self._process.death.done():
            return f"{self._name} died: {self._process.obituary()}"
        return self._verdict

    def require_running(self) -> None:
        """Raise EngineError if the process is gone. Cheap: it reads no log, for thousands of requests may wait."""
        if self._process.death.done():
            raise EngineError(f"{self._name} died")

    async def until_exit(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, or raise EngineError as soon as the server's process is gone."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._process.death], return_when=asyncio.FIRST_COMPLETED)
            if self._process.death.done() and (not task.done() or task.exception() is not None):
                raise EngineError(f"{self._name} died: {self._process.obituary()}")
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def kill_if_silent(self, probe: Probe) -> None:
        """Wait until the server is silent for `hang_timeout`, then kill it."""
        await until_silent(probe, self._settings.hang_timeout)
        await self._kill_as_hung()

    async def check(self, probe: Probe) -> None:
        """Request a sign of life, and kill the server if it gives none within `hang_timeout`."""
        if self.why_down():
            return
        try:
            alive = await self.until_exit(answers(probe, self._settings.hang_timeout))
        except EngineError:
            return  # `why_down` gives the exit as the reason
        if not alive:
            await self._kill_as_hung()

    async def _kill_as_hung(self) -> None:
        self._verdict = (
            f"{self._name} gave no sign of life for {self._settings.hang_timeout:g} s (strategy_config.hang_timeout) "
            f"and was killed; the end of {self._process.log_path}:\n{self._process.log_tail()}"
        )
        logger.warning("%s", self._verdict)
        await self._process.stop(grace_s=0.0)

    async def reclassify_dropped(self, result: GenerateResult, burst: Burst) -> GenerateResult:
        """Turn dropped samples into lost ones if the engine is down: another engine may return them.

        An engine without any sample for the several prompts of a burst counts as broken.
        """
        if result.trajectories:
            burst.succeeded()
        if not result.dropped:
            return result
        await asyncio.wait([self._process.death], timeout=EXIT_S)
        failed = [] if result.trajectories or result.lost else await burst.failures(result)
        if failed and not self.why_down():
            reasons = [reason for one in failed for reason in one.dropped.values()]
            self._verdict = (
                f"{self._name} gave nothing usable: {len(reasons)} samples of {len(failed)} prompts failed, with "
                f"{self._settings.max_retries} retries each (strategy_config.max_retries); the last: {reasons[-1]}"
            )
            logger.warning("%s", self._verdict)
        return replace(result, dropped={}, lost=(*result.lost, *result.dropped)) if self.why_down() else result


async def answers(
    probe: Probe, seconds: float, *, now: Callable[[], float] = time.monotonic, sleep: Sleep = asyncio.sleep
) -> bool:
    """Return True at the first sign of life; False after `seconds` without one, or up to two thirds of it later."""
    share = seconds / _QUESTIONS
    began, asked = now(), 0
    while asked < _QUESTIONS or now() - began < seconds:
        if await probe(share):
            return True
        asked += 1
        await sleep(min(_REFUSED_S, share))
    return False


async def until_silent(
    probe: Probe, seconds: float, *, now: Callable[[], float] = time.monotonic, sleep: Sleep = asyncio.sleep
) -> None:
    """Return once the server gave no sign of life for `seconds`; never return while it gives them."""
    while await answers(probe, seconds, now=now, sleep=sleep):
        await sleep(min(_PAUSE_S, seconds / _QUESTIONS))
