"""Names of the tensors received in an update. vLLM itself counts a layer's elements only."""

from __future__ import annotations

from collections.abc import Iterable


class ReceivedNames:
    """Names in one trainer's updates: unique in each update, and the same in all."""

    def __init__(self) -> None:
        self._of_this: set[str] = set()
        self._of_the_first: frozenset[str] = frozenset()

    def begin(self) -> None:
        """Start an update; the names of an unfinished one are discarded."""
        self._of_this.clear()

    def add(self, names: Iterable[str]) -> None:
        """Add names. Raises ValueError for a name already in this update."""
        for name in names:
            if name in self._of_this:
                raise ValueError(f"{name} came twice in one update")
            self._of_this.add(name)

    def ending_in(self, end: str) -> int:
        """Return the number of names in this update with this ending."""
        return sum(name.endswith(end) for name in self._of_this)

    def missing(self) -> list[str]:
        """Return the names of the first update that this one lacks."""
        return sorted(self._of_the_first - self._of_this)

    def finish(self) -> None:
        """Complete the update."""
        self._of_the_first = self._of_the_first or frozenset(self._of_this)
