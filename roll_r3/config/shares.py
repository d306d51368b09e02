"""Division of a step's prompts among sections of `rewards`."""

from __future__ import annotations

from collections.abc import Mapping


def section_sizes(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Return the prompts of each section, as ROLL: int(share x size), and the rest for the last section.

    Args:
        shares: share of each section; at least one.
        size: prompts of all sections.
    """
    sizes = {name: int(share * size) for name, share in shares.items()}
    last = next(reversed(sizes))
    sizes[last] = size - sum(count for name, count in sizes.items() if name != last)
    return sizes
