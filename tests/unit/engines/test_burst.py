"""Requests under way together: one watch, one question whether the engine is open, one verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from roll_r3.engines.burst import Burst
from roll_r3.strategies.base import GenerateResult


class Engine:
    """Counts the watches and the questions."""

    def __init__(self) -> None:
        self.watches = self.watching = self.questions = 0
        self.burst = Burst(self._watch, self._closed)

    async def _watch(self) -> None:
        self.watches += 1
        self.watching += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.watching -= 1

    async def _closed(self) -> str:
        self.questions += 1
        await asyncio.sleep(0)
        return "closed"


def dropped(name: str) -> GenerateResult:
    return GenerateResult((), {name: "bad"})


def run(scenario: Callable[[Engine], Awaitable[None]]) -> None:
    async def bounded() -> None:
        engine = Engine()
        await asyncio.wait_for(scenario(engine), 10)
        assert engine.watching == 0

    asyncio.run(bounded())


def test_requests_share_a_watch_and_a_question_and_the_next_burst_has_its_own() -> None:
    async def scenario(engine: Engine) -> None:
        async def request() -> str:
            async with engine.burst as burst:
                return await burst.why_closed()

        assert await asyncio.gather(request(), request(), request()) == ["closed"] * 3
        assert (engine.watches, engine.questions, engine.watching) == (1, 1, 0)
        await request()
        assert (engine.watches, engine.questions) == (2, 2)

    run(scenario)


async def fruitless(engine: Engine, name: str) -> list[str]:
    async with engine.burst as burst:
        await asyncio.sleep(0)  # as every request asks a server first
        return sorted(i for result in await burst.failures(dropped(name)) for i in result.dropped)


async def fruitful(engine: Engine, rounds: int) -> None:
    async with engine.burst as burst:
        for _ in range(rounds):
            await asyncio.sleep(0)
        burst.succeeded()


def test_an_engine_that_brings_nothing_to_several_prompts_is_broken() -> None:
    async def scenario(engine: Engine) -> None:
        found = await asyncio.gather(*(fruitless(engine, name) for name in "abc"))
        assert found == [["a", "b", "c"]] * 3

    run(scenario)


def test_a_single_prompt_says_too_little() -> None:
    async def scenario(engine: Engine) -> None:
        assert await fruitless(engine, "a") == []

    run(scenario)


def test_a_sample_that_comes_before_or_after_speaks_for_the_engine() -> None:
    async def scenario(engine: Engine) -> None:
        for rounds in (0, 50):
            found = await asyncio.gather(fruitless(engine, "a"), fruitless(engine, "b"), fruitful(engine, rounds))
            assert found == [[], [], None]

        async def late() -> list[str]:
            await asyncio.sleep(0.01)
            return await fruitless(engine, "a")

        async def holding() -> None:
            async with engine.burst as burst:
                burst.succeeded()
                await asyncio.sleep(0.05)

        assert await asyncio.gather(holding(), late()) == [None, []]

    run(scenario)


def test_an_engine_that_breaks_after_its_first_sample_holds_what_it_fails_until_all_have_failed() -> None:
    """Or it would get everything that waits: it fails faster than others sample. The next burst finds it broken."""

    async def scenario(engine: Engine) -> None:
        order: list[str] = []

        async def failing(name: str, after: float) -> list[str]:
            async with engine.burst as burst:
                await asyncio.sleep(after)
                order.append(f"{name} failed")
                found = await burst.failures(dropped(name))
                order.append(f"{name} released")
                return [i for result in found for i in result.dropped]

        found = await asyncio.gather(fruitful(engine, 1), failing("a", 0.01), failing("b", 0.03), failing("c", 0.05))
        assert found == [None, [], [], []]
        assert order[:3] == ["a failed", "b failed", "c failed"]
        assert sorted(order[3:]) == ["a released", "b released", "c released"]
        assert await asyncio.gather(fruitless(engine, "d"), fruitless(engine, "e")) == [["d", "e"]] * 2

    run(scenario)


def test_a_later_sample_releases_what_failed_before() -> None:
    async def scenario(engine: Engine) -> None:
        async def going_on() -> None:
            async with engine.burst as burst:
                burst.succeeded()
                await asyncio.sleep(0.01)
                burst.succeeded()
                await asyncio.sleep(3600)

        others = asyncio.create_task(going_on())
        await asyncio.sleep(0)
        assert await asyncio.gather(fruitless(engine, "a"), fruitless(engine, "b")) == [[], []]
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)

    run(scenario)


def test_a_request_that_ends_without_a_word_holds_nobody() -> None:
    """Its samples are lost, as when the engine died."""

    async def scenario(engine: Engine) -> None:
        async def lost() -> None:
            async with engine.burst:
                await asyncio.sleep(0.01)

        found = await asyncio.gather(fruitless(engine, "a"), lost())
        assert found[0] == ["a"]

    run(scenario)
