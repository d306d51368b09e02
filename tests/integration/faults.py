"""Helpers of tests of faults: the visible message, the time to recover, the lost work.

    @pytest.mark.fault("a training rank is killed")
    def test_...(fault):
        ...
        fault.user_sees("actor_train-1 died ...")
        fault.recovered(seconds)
        fault.lost("the step that was being made")

A test with the marker passes only if it has recorded all three. `make reliability` runs these tests and writes
docs/reliability.md from their records (see reliability.py). `nothing_left` looks for leftovers of a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from leftovers import nothing_left

__all__ = ["Fault", "Outcome", "nothing_left"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a fault."""

    sees: str
    """Message shown to a person."""
    seconds: float
    """Seconds until the run does its work again; if nothing recovers, seconds until the message."""
    lost: str


class Fault:
    """Recorder of one fault's outcome."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sees: str | None = None
        self._seconds: float | None = None
        self._lost: str | None = None

    def user_sees(self, text: str) -> None:
        """Record the message, or where to find it: one line, without parts that differ between runs."""
        self._sees = text

    def recovered(self, seconds: float) -> None:
        """Record the seconds from the fault, or from the start of the resumed run, until normal work."""
        self._seconds = seconds

    def lost(self, text: str) -> None:
        """Record the work lost or to be repeated; "nothing" if none."""
        self._lost = text

    @property
    def outcome(self) -> Outcome:
        """Return the outcome; raise AssertionError if a part was not recorded."""
        assert self._sees is not None, f"{self.name}: fault.user_sees(...) was not called"
        assert self._seconds is not None, f"{self.name}: fault.recovered(...) was not called"
        assert self._lost is not None, f"{self.name}: fault.lost(...) was not called"
        return Outcome(self._sees, self._seconds, self._lost)
