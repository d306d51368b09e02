"""A hung server is found in bounded time, a busy one is left alone. A simulated clock replaces waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from roll_r3.engines.health import answers, until_silent

SECONDS = 30.0


class Clock:
    """Simulated clock; it advances only during waits."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


class Server:
    """Server with answer and seconds of each question from `outcome(number)`; None: no answer."""

    def __init__(self, clock: Clock, outcome: Callable[[int], tuple[bool, float] | None]) -> None:
        self.clock, self.outcome, self.asked = clock, outcome, 0

    async def probe(self, timeout_s: float) -> bool:
        self.asked += 1
        outcome = self.outcome(self.asked)
        if outcome is None or outcome[1] > timeout_s:
            await self.clock.sleep(timeout_s)
            return False
        await self.clock.sleep(outcome[1])
        return outcome[0]


def found_silent(outcome: Callable[[int], tuple[bool, float] | None]) -> tuple[float, int]:
    """Return the seconds until a server was taken for hung, and the number of questions."""
    clock = Clock()
    server = Server(clock, outcome)
    asyncio.run(until_silent(server.probe, SECONDS, now=clock.now, sleep=clock.sleep))
    return clock.time - 1000.0, server.asked


def asked_until(work: Awaitable[object], server: Server, questions: int) -> bool:
    """Return True if `work` still runs after this number of questions."""

    async def scenario() -> bool:
        task = asyncio.ensure_future(work)
        while server.asked < questions and not task.done():
            await asyncio.sleep(0)
        going_on = not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return going_on

    return asyncio.run(scenario())


@pytest.mark.parametrize("after", [0, 4])
def test_a_server_that_stops_answering_is_silent_soon_after(after: int) -> None:
    seconds, _ = found_silent(lambda number: (True, 0.1) if number <= after else None)
    alive = after * (0.1 + 5.0)
    assert alive + SECONDS <= seconds <= alive + SECONDS * 5 / 3


def test_refusals_that_come_at_once_are_no_sign_of_life_and_take_as_long() -> None:
    seconds, asked = found_silent(lambda number: (False, 0.0))
    assert SECONDS <= seconds <= SECONDS * 5 / 3
    assert asked < 40, "a server that is busy refusing is not kept busier"


def test_a_busy_server_that_refuses_now_and_then_is_alive() -> None:
    """Simulate SGLang, which refuses while a batch takes longer than its wait of 20 s."""
    clock = Clock()
    server = Server(clock, lambda number: (number % 2 == 0, 8.0))
    assert asked_until(until_silent(server.probe, SECONDS, now=clock.now, sleep=clock.sleep), server, 1000)


def test_who_was_stopped_itself_asks_again_before_it_says_so() -> None:
    """Let the pending question time out during the stop, with a healthy server."""
    clock = Clock()

    async def probe(timeout_s: float) -> bool:
        nonlocal asked
        asked += 1
        await clock.sleep(1e6 if asked == 1 else 0.1)
        return asked > 1

    asked = 0
    assert asyncio.run(answers(probe, SECONDS, now=clock.now, sleep=clock.sleep))
    assert asked == 2
