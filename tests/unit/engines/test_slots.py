"""Number of slots as the limit, order of arrival, urgent requests first."""

from __future__ import annotations

import asyncio

import pytest

from roll_r3.engines.slots import Slots


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_urgent_come_first_and_the_others_in_their_order():
    async def scenario() -> list[str]:
        slots, order = Slots(1), []

        async def enter(name: str, urgent: bool) -> None:
            async with slots.hold(urgent=urgent):
                assert slots.free == 0
                order.append(name)
                await asyncio.sleep(0)

        async with slots.hold():
            tasks = []
            for name, urgent in (("a", False), ("b", False), ("c", True), ("d", True), ("e", False)):
                tasks.append(asyncio.create_task(enter(name, urgent)))
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert slots.free == 1
        return order

    assert asyncio.run(scenario()) == ["c", "d", "a", "b", "e"]


def test_several_are_taken_together_and_nobody_overtakes():
    async def scenario() -> None:
        slots = Slots(4)
        await slots.acquire(3)
        two, one = (asyncio.create_task(slots.acquire(count)) for count in (2, 1))
        await settle()
        assert not two.done() and not one.done()
        slots.release(1)
        await settle()
        assert two.done() and not one.done()
        slots.release(2)
        await settle()
        assert one.done()
        assert slots.free == 1

    asyncio.run(scenario())


def test_who_gives_up_leaves_nothing_taken_and_nobody_waiting_behind_it():
    async def scenario() -> None:
        slots = Slots(2)
        await slots.acquire()
        two, one = (asyncio.create_task(slots.acquire(count)) for count in (2, 1))
        await settle()
        two.cancel()
        await settle()
        assert one.done()
        granted = asyncio.create_task(slots.acquire(2))
        await settle()
        slots.release(2)
        granted.cancel()  # after the grant, before the task knows of it
        assert slots.free == 0
        with pytest.raises(asyncio.CancelledError):
            await granted
        assert slots.free == 2

    asyncio.run(scenario())
