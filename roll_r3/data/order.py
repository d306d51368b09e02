"""Endless seeded order of prompts."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from roll_r3.errors import ConfigError

Draws = tuple[tuple[int, int], ...]
"""(steps, prompts per step) drawn from an order, in this order. Steps without a prompt are left out."""
_MOST_PASSES = 1 << 18
"""Maximum number of passes replayed to find a place in the data; takes a minute at most."""


class PromptOrder:
    """Order of a number of prompts, with the current place in it; (key, pass) decides the order of each pass.

    A step may span two passes. A prompt occurs at most once in a step, unless the step takes more prompts than there
    are.
    """

    def __init__(self, prompts: int, key: tuple[int, ...], drawn: Draws = ()) -> None:
        """
        Args:
            drawn: steps drawn before. The order continues after them.

        Raises:
            ConfigError: finding the place after `drawn` would take too long.
        """
        self._prompts, self._key = prompts, key
        self._epoch = 0
        """Index of the next pass."""
        self._pass: npt.NDArray[np.int64] = np.arange(prompts)
        self._at = prompts
        """Number of prompts drawn from this pass."""
        for steps, size in drawn:
            self._skip(steps, size)

    def draw(self, count: int, already: int = 0, *, repeats: bool = False) -> list[int]:
        """Draw the next prompts of a step: their indices.

        Args:
            already: number of prompts drawn for this step before.
            repeats: True if the step takes more prompts than there are.
        """
        drawn: list[int] = []
        while len(drawn) < count:
            if self._at == self._prompts:
                self._begin_pass(0 if repeats else already + len(drawn))
            piece = self._pass[self._at : self._at + count - len(drawn)].tolist()
            drawn += piece
            self._at += len(piece)
        return drawn

    def _skip(self, batches: int, size: int) -> None:
        """Advance as if `batches` batches were drawn.

        The order of a pass depends on its number, and on the prompts that its first batch took from the previous pass.
        So only the passes after the last one aligned with a batch are replayed.

        Raises:
            ConfigError: too many passes would be replayed.
        """
        at, end = self._at, self._at + batches * size  # counted from the start of this pass
        begun = (end - 1) // self._prompts
        first = max(1, self._last_aligned(begun, size))
        if begun - first >= _MOST_PASSES:
            raise ConfigError(
                f"the place in the data after {batches} batches of {size} prompts of {self._prompts} cannot be found: "
                f"{begun - first} passes over the data would have to be replayed, more than {_MOST_PASSES}. "
                "Start from the weights of the checkpoint (python -m roll_r3.export makes a pretrain of them)"
            )
        self._epoch += first - 1
        for number in range(first, begun + 1):
            self._begin_pass((number * self._prompts - at) % size if size <= self._prompts else 0)
        self._at = end - begun * self._prompts

    def _last_aligned(self, begun: int, size: int) -> int:
        """Return the last of the next passes aligned with a batch; 0 or less: none of them is.

        Pass i begins after i * prompts - at prompts from here. It is aligned where this is a multiple of size.
        """
        if size > self._prompts:
            return begun
        common = math.gcd(self._prompts, size)
        if self._at % common:
            return 0
        every = size // common
        one = self._at // common * pow(self._prompts // common, -1, every) % every
        return begun - (begun - one) % every

    def _begin_pass(self, taken: int) -> None:
        """
        Args:
            taken: number of prompts that the current step took from the end of the last pass. They go to the end of
                the new pass, so that the step holds no prompt twice.
        """
        order = np.random.default_rng((*self._key, self._epoch)).permutation(self._prompts)
        self._epoch += 1
        late = np.zeros(self._prompts, bool)
        late[self._pass[self._prompts - taken :]] = True
        self._pass, self._at = np.concatenate([order[~late[order]], order[late[order]]]), 0
