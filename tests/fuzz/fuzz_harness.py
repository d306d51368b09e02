"""Harness for families of hostile inputs: drawing, limits, verdicts and counts.

A family draws inputs and judges the product's reaction to each. An input ends in one of three ways. It is taken, and a
check independent of the tested code agrees. It is refused in the promised words. Or it is a failure: another exception,
too much time, too much memory, or a wrong input taken.
"""

from __future__ import annotations

import gc
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import psutil
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

SECONDS = 10.0
"""Limit of one input in seconds of processor time, independent of other load on the machine."""
ASLEEP = 120.0
"""Limit of one input in seconds of the clock, for code that waits and computes nothing."""
MEMORY = 1 << 30
"""Limit of the mapped bytes beyond those before the first input."""

Verdict = Literal["taken", "refused"]


class Wrong(AssertionError):
    """Forbidden reaction of the product to an input."""


class TooSlow(BaseException):
    """Time limit exceeded; not an Exception, so that no handler on the way catches it."""


class Family(Protocol):
    """One kind of hostile input."""

    name: str

    def inputs(self) -> st.SearchStrategy[Any]:
        """Return the strategy of the inputs."""
        ...

    def judge(self, value: Any) -> Verdict:
        """Return the verdict of one input; raise Wrong, or any escaped exception."""
        ...

    def close(self) -> None: ...


@dataclass
class Tally:
    """Counts of a family's verdicts."""

    name: str
    taken: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Largest processor time of an input, in seconds."""
    seconds: float = 0.0
    """Clock time of all inputs, in seconds."""

    @property
    def inputs(self) -> int:
        return self.taken + self.refused + len(self.failures)

    def __str__(self) -> str:
        return (
            f"{self.name:<12}{self.inputs:>8}{self.taken:>10}{self.refused:>10}{len(self.failures):>10}"
            f"{self.slowest:>11.2f}{self.seconds:>10.1f}"
        )


HEADING = f"{'family':<12}{'inputs':>8}{'taken':>10}{'refused':>10}{'failures':>10}{'slowest s':>11}{'clock s':>10}"


def tally(family: Family, count: int, number: int) -> Tally:
    """Draw and judge `count` inputs; `number` is the seed."""
    found = Tally(family.name)
    started = time.monotonic()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    @given(value=family.inputs())
    def each(value: Any) -> None:
        begun = time.process_time()
        try:
            with limited():
                verdict = family.judge(value)
        except (Exception, TooSlow) as error:  # noqa: BLE001  every escaped exception is a finding
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:300]} (at {last.filename}:{last.lineno}) of {value!r}"
            found.failures.append(text[:1500])
        else:
            if verdict == "taken":
                found.taken += 1
            else:
                found.refused += 1
        found.slowest = max(found.slowest, time.process_time() - begun)

    gc.collect()
    with little_memory():
        each()
    found.seconds = time.monotonic() - started
    return found


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooSlow when this block takes too long."""

    def stop(signum: int, frame: object) -> None:
        raise TooSlow(f"more than {SECONDS:g} s of a processor, or {ASLEEP:g} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, ASLEEP)}
    previous = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit memory in this block: a larger allocation raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def mutated(draw: st.DrawFn, original: bytes, *, most: int = 4) -> bytes:
    """Draw bytes with a few pieces changed, cut out, doubled, or inserted."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["bit", "bytes", "insert", "cut", "truncate", "double", "word"]))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            piece = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16) | st.sampled_from(JUNK))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "truncate":
            del data[at:]
        elif kind == "double":
            end = at + draw(st.integers(1, 40))
            data[at:at] = data[at:end]
        elif kind == "word":
            width = draw(st.sampled_from([2, 4, 8]))
            data[at : at + width] = draw(st.sampled_from(NUMBERS)).to_bytes(16, "little", signed=True)[:width]
    return bytes(data)


NUMBERS = [0, 1, -1, 2, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]
JUNK = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 5000, b"NaN", b"-Infinity", b"1e999", b"9" * 5000,
    b'"\\ud800"', b"null", b"true", b"{}", b"[]", b'""', b"\n", b",", b"../../etc/passwd", b"%s%n", b"\x1b[2J",
]  # fmt: skip
HOSTILE = st.sampled_from(
    [None, True, False, 0, 1, -1, 3, 1.0, 2.5, -0.5, 1e308, float("nan"), float("inf"), 10**25, -(10**25), 10**4000, "",
     "0", "4", "-0.5", "x" * 3000, "\ud800", "\x1b[2J", "NaN", [], {}, [None], [[]], {"": None}, "..", "/etc/passwd"]
)  # fmt: skip
"""Values of a wrong kind or size for a place in a JSON document."""


@st.composite
def replanted(draw: st.DrawFn, original: Any, *, most: int = 3) -> Any:
    """Draw a JSON value with a few places replaced, removed, or filled from another place."""
    value = original
    for _ in range(draw(st.integers(1, most))):
        places = list(paths(value))
        place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["hostile", "hostile", "remove", "move", "wrap", "number"]))
        found = _at(value, place)
        if kind == "hostile":
            new: Any = draw(HOSTILE)
        elif kind == "move":
            new = _at(value, draw(st.sampled_from(places)))
        elif kind == "wrap":
            new = draw(st.sampled_from([[found], {"a": found}, str(found)[:50]]))
        elif kind == "number":
            small = type(found) in (int, float) and abs(found) < 1 << 1000  # larger numbers are not floats
            new = found + draw(st.sampled_from([1, -1, 0.5])) if small else draw(st.integers())
        else:
            new = REMOVED
        value = _with(value, place, new)
    return value


REMOVED = object()


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every place in a JSON value."""
    yield above
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*above, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def _with(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return None if new is REMOVED else new
    key, rest = place[0], place[1:]
    copied = value.copy()
    if not rest and new is REMOVED:
        del copied[key]
    else:
        copied[key] = _with(value[key], rest, new)
    return copied
