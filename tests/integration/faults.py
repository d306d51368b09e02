"""What tests that break something on purpose share: what a person sees of it, how soon the run goes on, what was lost.

    @pytest.mark.fault("a training rank is killed")
    def test_...(fault):
        ...
        fault.user_sees("actor_train-1 died ...")
        fault.recovered(seconds)
        fault.lost("the step that was being made")

A test with the marker passes only if it has said all three. `make reliability` runs them and writes
docs/reliability.md from what they said (see reliability.py). `nothing_left` looks for what a fault left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

from leftovers import nothing_left

__all__ = ["Fault", "Outcome", "nothing_left"]


@dataclass(frozen=True)
class Outcome:
    """What was seen of a fault."""

    sees: str
    """What a person reads."""
    seconds: float
    """Until it is said, where there is nothing to recover; else until the run does what it did before."""
    lost: str


class Fault:
    """What a test has to say of its fault."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sees: str | None = None
        self._seconds: float | None = None
        self._lost: str | None = None

    def user_sees(self, text: str) -> None:
        """What a person reads: a message, or where to look. One line, without what differs from run to run."""
        self._sees = text

    def recovered(self, seconds: float) -> None:
        """From the fault, or from the start of the run that goes on, until things are as they were before."""
        self._seconds = seconds

    def lost(self, text: str) -> None:
        """What has to be done again or is gone; "nothing" where that is so."""
        self._lost = text

    @property
    def outcome(self) -> Outcome:
        """Raises AssertionError: something was not said."""
        assert self._sees is not None, f"{self.name}: fault.user_sees(...) was not called"
        assert self._seconds is not None, f"{self.name}: fault.recovered(...) was not called"
        assert self._lost is not None, f"{self.name}: fault.lost(...) was not called"
        return Outcome(self._sees, self._seconds, self._lost)
