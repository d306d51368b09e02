"""Prompts: files in, token ids out, in a seeded order without end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.config.workers import DataArgs
from roll_r3.data.chat import Chat, ChatTokenizer
from roll_r3.data.faults import Faults, Refused
from roll_r3.data.rows import Row, read_rows
from roll_r3.errors import ConfigError

logger = logging.getLogger(__name__)

_SAY_EVERY = 15.0
"""Seconds between two lines that say how far tokenizing is."""
_MOST_PASSES = 1 << 18
"""Passes over the data that are gone through again to find a place in it: a minute at most."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data, ready to sample from."""

    prompt_id: str
    text: str
    """The last message, for people to read."""
    token_ids: tuple[int, ...]
    ground_truth: str
    domain: str = "default"
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation that the chat template was given, as {role, content}."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Every column of the row, as in the file."""


def read_prompts(
    args: DataArgs, tokenizer: ChatTokenizer, max_tokens: int, say: Callable[[str], None] = logger.info
) -> list[Prompt]:
    """Read, template and tokenize every row. Rows over `max_tokens` tokens are left out.

    Args:
        say: is told how many rows were left out, how many kept a system message of their own, and how far a long
            reading is.

    Raises:
        ConfigError: what cannot be used as it is, of all files at once; or no prompt is short enough.
    """
    faults = Faults()
    chat = Chat(tokenizer, args)
    rows = list(read_rows(args, faults))
    _refuse(faults)
    prompts = list(_tokenized(rows, chat, faults, say))
    _refuse(faults)
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if chat.own_system:
        say(f"{chat.own_system} of {len(rows)} rows keep their own system message, without data_args.system_prompt")
    if not short:
        raise ConfigError(
            f"actor_train.data_args.file_name ({args.file_name!r}): no prompt of at most prompt_length={max_tokens} "
            f"tokens; the shortest of {len(prompts)} has {min(len(prompt.token_ids) for prompt in prompts)}"
        )
    if long := len(prompts) - len(short):
        say(f"{long} of {len(prompts)} prompts are longer than prompt_length ({max_tokens} tokens) and were left out")
    return short


def _refuse(faults: Faults) -> None:
    if faults:
        raise ConfigError("\n  ".join(["actor_train.data_args: the data cannot be used as they are:", *faults.lines()]))


def _tokenized(rows: Sequence[Row], chat: Chat, faults: Faults, say: Callable[[str], None]) -> Iterator[Prompt]:
    said = time.monotonic()
    for done, row in enumerate(rows):
        if time.monotonic() - said > _SAY_EVERY:
            say(f"{done} of {len(rows)} prompts are tokenized")
            said = time.monotonic()
        messages = chat.conversation(row.messages)
        try:
            token_ids = chat.token_ids(messages)
        except Refused as refused:
            faults.of_row(row.place, refused)
            continue
        yield Prompt(
            prompt_id=row.id,
            text=messages[-1]["content"],
            token_ids=token_ids,
            ground_truth=row.ground_truth,
            domain=row.domain,
            messages=messages,
            row=row.columns,
        )


def prompt_batches(
    prompts: Sequence[Prompt], size: int, seed: int, *, drawn: Sequence[tuple[int, int]] = ()
) -> Iterator[list[Prompt]]:
    """Batches without end: each pass over the data in a new order that (seed, pass) decides.

    A batch may span two passes, so that none is short; it never holds a prompt twice unless `size` exceeds the data.

    Args:
        drawn: (batches, prompts of a batch) that were drawn before: what would follow them is what comes.

    Raises:
        ConfigError: to find what would follow them takes too long.
    """
    order = _Order(len(prompts), seed)
    for batches, earlier_size in drawn:
        order.skip(batches, earlier_size)
    return ([prompts[i] for i in order.draw(size)] for _ in count())


class _Order:
    """Which prompt comes next."""

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch = 0
        """Of the pass that is begun next."""
        self._pass: npt.NDArray[np.int64] = np.arange(prompts)
        self._at = prompts
        """How many of this pass are drawn."""

    def draw(self, size: int) -> list[int]:
        """The next batch."""
        batch: list[int] = []
        while len(batch) < size:
            if self._at == self._prompts:
                self._begin_pass(len(batch) if size <= self._prompts else 0)
            piece = self._pass[self._at : self._at + size - len(batch)].tolist()
            batch += piece
            self._at += len(piece)
        return batch

    def skip(self, batches: int, size: int) -> None:
        """As if so many batches were drawn.

        The order of a pass follows from its number and from what the batch in which it began took from the pass before.
        So only those passes are gone through that come after the last one that began together with a batch.

        Raises:
            ConfigError: these are too many.
        """
        at, end = self._at, self._at + batches * size  # counted from where this pass began
        begun = (end - 1) // self._prompts
        first = max(1, self._last_aligned(begun, size))
        if begun - first >= _MOST_PASSES:
            raise ConfigError(
                f"the place in the data after {batches} batches of {size} prompts of {self._prompts} cannot be found: "
                f"{begun - first} passes over the data would be gone through again, and {_MOST_PASSES} are the most. "
                "Start from the weights of the checkpoint (python -m roll_r3.export makes a pretrain of them)"
            )
        self._epoch += first - 1
        for number in range(first, begun + 1):
            self._begin_pass((number * self._prompts - at) % size if size <= self._prompts else 0)
        self._at = end - begun * self._prompts

    def _last_aligned(self, begun: int, size: int) -> int:
        """The last of the next passes that takes nothing over from the one before it; 0 or less: none of them.

        Pass i begins after i * prompts - at prompts from here: it takes nothing over where that is a multiple of size.
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
            taken: the batch took so many from the end of the last pass, and it shall hold no prompt twice: they go to
                the end of the new one.
        """
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._prompts)
        self._epoch += 1
        late = np.zeros(self._prompts, bool)
        late[self._pass[self._prompts - taken :]] = True
        self._pass, self._at = np.concatenate([order[~late[order]], order[late[order]]]), 0
