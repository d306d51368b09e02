"""Which tensors an update brought, by name. vLLM counts a layer's elements, whichever tensors they came in."""

from __future__ import annotations

from collections.abc import Iterable


class ReceivedNames:
    """The names of one trainer's updates: none comes twice in one, and each brings what the first one brought."""

    def __init__(self) -> None:
        self._of_this: set[str] = set()
        self._of_the_first: frozenset[str] = frozenset()

    def begin(self) -> None:
        """An update starts; what an unfinished one brought is forgotten."""
        self._of_this.clear()

    def add(self, names: Iterable[str]) -> None:
        """Raises ValueError for a name that this update has brought already."""
        for name in names:
            if name in self._of_this:
                raise ValueError(f"{name} came twice in one update")
            self._of_this.add(name)

    def ending_in(self, end: str) -> int:
        """How many names of this update end so."""
        return sum(name.endswith(end) for name in self._of_this)

    def missing(self) -> list[str]:
        """What the first update brought and this one has not."""
        return sorted(self._of_the_first - self._of_this)

    def finish(self) -> None:
        """The update was whole."""
        self._of_the_first = self._of_the_first or frozenset(self._of_this)
