"""One future for the results of many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

Part = TypeVar("Part")
Whole = TypeVar("Whole")


def gathered(parts: Sequence[Future[Part]], make: Callable[[list[Part]], Whole]) -> Future[Whole]:
    """Return a future of `make` of all results, in their order.

    It fails with the first error of a part. Cancelling it cancels the parts not begun yet.
    """
    whole: Future[Whole] = Future()
    lock = threading.Lock()
    left = len(parts)

    def finish() -> None:
        try:
            result = make([part.result() for part in parts])
        except BaseException as error:  # noqa: BLE001  belongs to the future
            _end(whole, error)
        else:
            if whole.set_running_or_notify_cancel():
                whole.set_result(result)

    def part_done(part: Future[Part]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            finish()

    def whole_done(_: Future[Whole]) -> None:
        if whole.cancelled():
            for part in parts:
                part.cancel()

    whole.add_done_callback(whole_done)
    for part in parts:
        part.add_done_callback(part_done)
    if not parts:
        finish()
    return whole


def _end(future: Future[Whole], error: BaseException) -> None:
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
