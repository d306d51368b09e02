"""Prompts: tokenized rows of the data files, drawn in an endless seeded order."""

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
from roll_r3.data.faults import DataError, Faults
from roll_r3.data.row_reader import Row, read_rows
from roll_r3.errors import ConfigError

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 15.0
"""Seconds between two progress messages of tokenizing."""
_MOST_PASSES = 1 << 18
"""Maximum number of passes replayed to find a place in the data; takes a minute at most."""


@dataclass(frozen=True)
class Prompt:
    """Row of the data, ready for sampling."""

    prompt_id: str
    text: str
    """Last message, for logs and samples.jsonl."""
    token_ids: tuple[int, ...]
    ground_truth: str
    domain: str = "default"
    messages: tuple[Mapping[str, str], ...] = ()
    """Conversation passed to the chat template, as {role, content}."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row, as in the file."""


def read_prompts(
    args: DataArgs, tokenizer: ChatTokenizer, max_tokens: int, say: Callable[[str], None] = logger.info
) -> list[Prompt]:
    """Read, template and tokenize all rows; skip prompts longer than `max_tokens`.

    Args:
        say: receives messages: progress, number of skipped rows, number of rows with their own system message.

    Raises:
        ConfigError: the faults of all files; or no prompt is short enough.
    """
    faults = Faults()
    chat = Chat(tokenizer, args)
    rows = list(read_rows(args, faults))
    _raise_if_any(faults)
    prompts = list(_tokenized(rows, chat, faults, say))
    _raise_if_any(faults)
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if chat.own_system:
        say(f"{chat.own_system} of {len(rows)} rows keep their own system message instead of data_args.system_prompt")
    if not short:
        raise ConfigError(
            f"actor_train.data_args.file_name ({args.file_name!r}): no prompt of at most prompt_length={max_tokens} "
            f"tokens; the shortest of {len(prompts)} has {min(len(prompt.token_ids) for prompt in prompts)}"
        )
    if long := len(prompts) - len(short):
        say(f"skipped {long} of {len(prompts)} prompts longer than prompt_length ({max_tokens} tokens)")
    return short


def _raise_if_any(faults: Faults) -> None:
    if faults:
        raise ConfigError("\n  ".join(["actor_train.data_args: the data cannot be used:", *faults.lines()]))


def _tokenized(rows: Sequence[Row], chat: Chat, faults: Faults, say: Callable[[str], None]) -> Iterator[Prompt]:
    logged = time.monotonic()
    for done, row in enumerate(rows):
        if time.monotonic() - logged > _LOG_INTERVAL_S:
            say(f"tokenized {done} of {len(rows)} prompts")
            logged = time.monotonic()
        messages = chat.conversation(row.messages)
        try:
            token_ids = chat.token_ids(messages)
        except DataError as error:
            faults.add_row(row.place, error)
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
    """Return an endless iterator of batches; (seed, pass) decides the order of each pass over the data.

    A batch may span two passes, so that all batches have `size` prompts. A prompt occurs at most once in a batch unless
    `size` exceeds the data.

    Args:
        drawn: (batches, prompts per batch) drawn before. The iterator continues after them.

    Raises:
        ConfigError: finding the place after `drawn` would take too long.
    """
    order = _Order(len(prompts), seed)
    for batches, earlier_size in drawn:
        order.skip(batches, earlier_size)
    return ([prompts[i] for i in order.draw(size)] for _ in count())


class _Order:
    """Order of the prompts, with the current place in it."""

    def __init__(self, prompts: int, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch = 0
        """Index of the next pass."""
        self._pass: npt.NDArray[np.int64] = np.arange(prompts)
        self._at = prompts
        """Number of prompts drawn from this pass."""

    def draw(self, size: int) -> list[int]:
        """Draw the next batch of prompt indices."""
        batch: list[int] = []
        while len(batch) < size:
            if self._at == self._prompts:
                self._begin_pass(len(batch) if size <= self._prompts else 0)
            piece = self._pass[self._at : self._at + size - len(batch)].tolist()
            batch += piece
            self._at += len(piece)
        return batch

    def skip(self, batches: int, size: int) -> None:
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
            taken: number of prompts that the current batch took from the end of the last pass. They go to the end of
                the new pass, so that the batch holds no prompt twice.
        """
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._prompts)
        self._epoch += 1
        late = np.zeros(self._prompts, bool)
        late[self._pass[self._prompts - taken :]] = True
        self._pass, self._at = np.concatenate([order[~late[order]], order[late[order]]]), 0
