"""Semaphore with a fast lane for urgent tasks."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A semaphore: first come, first served, but urgent tasks come before all others.

    Example:
        >>> async def three() -> int:
        ...     slots = Slots(3)
        ...     async with slots.hold():
        ...         return slots.free
        >>> asyncio.run(three())
        2
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._arrivals = 0
        self._waiting: list[tuple[bool, int, int, asyncio.Future[None]]] = []

    async def acquire(self, count: int = 1, *, urgent: bool = False) -> None:
        """Wait for `count` slots, at most `total`, and take them together."""
        self._arrivals += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not urgent, self._arrivals, count, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(count)
            else:
                turn.cancel()
                self._admit()  # a task behind it may need fewer
            raise

    def release(self, count: int = 1) -> None:
        """Give `count` slots back."""
        self.free += count
        self._admit()

    @asynccontextmanager
    async def hold(self, *, urgent: bool = False) -> AsyncIterator[None]:
        """Hold one slot within the block."""
        await self.acquire(urgent=urgent)
        try:
            yield
        finally:
            self.release()

    def _admit(self) -> None:
        while self._waiting:
            _, _, count, turn = self._waiting[0]
            if not turn.done():
                if count > self.free:
                    return
                self.free -= count
                turn.set_result(None)
            heapq.heappop(self._waiting)
