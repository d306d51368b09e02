"""Prompts of each step, drawn in endless seeded orders: of all prompts, or one for each section of `rewards`."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from roll_r3.config.shares import section_sizes
from roll_r3.data.order import Draws, PromptOrder
from roll_r3.data.prompts import Prompt
from roll_r3.errors import ConfigError

ALL = ""
"""Name of the part with all prompts."""


@dataclass(frozen=True)
class SectionPlace:
    """Place in the order of one section's prompts."""

    prompts: int
    """Number of the section's prompts."""
    drawn: Draws = ()


@dataclass(frozen=True)
class Place:
    """Place of a run in its prompts, after some steps."""

    drawn: Draws = ()
    """Draws from the order of all prompts."""
    sections: Mapping[str, SectionPlace] = field(default_factory=dict)
    """Places in the orders of sections of `rewards`."""
    returned: tuple[int, ...] = ()
    """Numbers of drawn prompts, in the order of reading, which no step used. They are drawn first."""


NOWHERE = Place()
"""Place of a run before its first step."""


class Part:
    """Prompts drawn in one order, with a fixed number in each step.

    Returned prompts come before new ones. New ones occur at most once in a step, unless a step has more prompts than
    there are.
    """

    def __init__(self, name: str, size: int, prompts: Sequence[int], order: PromptOrder, place: Place) -> None:
        """
        Args:
            size: prompts of a step.
            prompts: numbers of the prompts, in the order of reading.
            order: order of `prompts`, at the place.
            place: returned prompts of other parts are ignored.
        """
        self.name, self.size = name, size
        self._prompts, self._order = prompts, order
        own = set(prompts) if place.returned else set()
        self._returned = [number for number in place.returned if number in own]
        self._drawn = place.drawn if name == ALL else place.sections[name].drawn if name in place.sections else ()
        self._new = self._used = 0

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def drawn(self) -> Draws:
        """Draws of the finished steps."""
        return self._drawn

    @property
    def returned(self) -> tuple[int, ...]:
        """Prompts drawn, and used by no step."""
        return tuple(self._returned)

    @property
    def left(self) -> int | None:
        """Number of prompts that the step can still draw without a repetition; None: it repeats them anyway."""
        return None if self._repeats else len(self._prompts) - self._used

    @property
    def _repeats(self) -> bool:
        return self.size > len(self._prompts)

    def begin(self) -> None:
        """Begin a step."""
        self._new = self._used = 0

    def draw(self, count: int) -> list[int]:
        """Draw prompts for the step: their numbers in the order of reading."""
        first, self._returned = self._returned[:count], self._returned[count:]
        fresh = self._order.draw(count - len(first), self._new, repeats=self._repeats)
        self._new += len(fresh)
        self._used += count
        return first + [self._prompts[i] for i in fresh]

    def end(self, unused: Sequence[int]) -> None:
        """End the step.

        Args:
            unused: drawn prompts to draw first in the next step. They are forgotten if a step repeats all prompts.
        """
        if not self._repeats:
            self._returned = [*unused, *self._returned]
        if self._new:
            self._drawn = _with_step(self._drawn, self._new)


class PromptSource:
    """Prompts of a run in parts, each with its own order and place."""

    def __init__(self, prompts: Sequence[Prompt], parts: Sequence[Part], place: Place) -> None:
        self.prompts, self.parts = prompts, parts
        self._begun = place
        own = {number for part in parts for number in part.returned}
        self._others = tuple(number for number in place.returned if number not in own)

    @property
    def place(self) -> Place:
        """Place after the finished steps. Sections without a part in this run keep theirs."""
        drawn, sections = self._begun.drawn, dict(self._begun.sections)
        for part in self.parts:
            if part.name == ALL:
                drawn = part.drawn
            else:
                sections[part.name] = SectionPlace(prompts=part.num_prompts, drawn=part.drawn)
        returned = [number for part in self.parts for number in part.returned]
        return Place(drawn, sections, (*returned, *self._others))


def prompt_source(
    prompts: Sequence[Prompt],
    size: int,
    seed: int,
    *,
    shares: Mapping[str, float],
    section_of: Callable[[str], str],
    place: Place = NOWHERE,
) -> PromptSource:
    """Return the prompts of a run, at a place.

    Args:
        size: prompts of a step.
        shares: share of a step's prompts for each section of `rewards`; empty: prompts as they come.
        section_of: section of a domain.

    Raises:
        ConfigError: a section without prompts; or finding the place would take too long.
    """
    if not shares:
        order = PromptOrder(len(prompts), (seed,), place.drawn)
        return PromptSource(prompts, [Part(ALL, size, range(len(prompts)), order, place)], place)
    numbers = section_prompts(prompts, shares, section_of)
    parts = []
    for name, section_size in section_sizes(shares, size).items():
        drawn = place.sections[name].drawn if name in place.sections else ()
        order = PromptOrder(len(numbers[name]), (seed, zlib.crc32(name.encode())), drawn)
        parts.append(Part(name, section_size, numbers[name], order, place))
    return PromptSource(prompts, parts, place)


def section_prompts(
    prompts: Sequence[Prompt], shares: Mapping[str, float], section_of: Callable[[str], str]
) -> dict[str, list[int]]:
    """Return the numbers of each section's prompts.

    Raises:
        ConfigError: a section has none.
    """
    found: dict[str, list[int]] = {name: [] for name in shares}
    for number, prompt in enumerate(prompts):
        section = section_of(prompt.domain)
        if section in found:
            found[section].append(number)
    empty = [name for name, numbers in found.items() if not numbers]
    if empty:
        raise ConfigError(
            f"actor_train.data_args.domain_interleave_probs: no prompt belongs to {', '.join(empty)}. Leave it out, or "
            "correct rewards.*.tag_included (a prompt belongs to the first section that scores its domain)"
        )
    return found


def unused_sections(
    prompts: Sequence[Prompt], shares: Mapping[str, float], section_of: Callable[[str], str]
) -> dict[str, int]:
    """Return the number of prompts of each section without a share."""
    counts = Counter(section_of(prompt.domain) for prompt in prompts)
    return {name: count for name, count in counts.items() if shares and name not in shares}


def _with_step(drawn: Draws, prompts: int) -> Draws:
    """Return the draws with one step more; equal steps in a row are counted together."""
    if drawn and drawn[-1][1] == prompts:
        return (*drawn[:-1], (drawn[-1][0] + 1, prompts))
    return (*drawn, (1, prompts))
