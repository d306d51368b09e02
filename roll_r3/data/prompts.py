"""Prompts: files in, token ids out, in a seeded order without end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from roll_r3.config.disk import is_file
from roll_r3.config.workers import DataArgs
from roll_r3.data.tiny_task import BUNDLED_TASKS
from roll_r3.errors import ConfigError

logger = logging.getLogger(__name__)

BUNDLED = "bundled:"
READERS = {".jsonl": "json", ".parquet": "parquet"}
_MOST_PASSES = 1 << 18
"""Passes over the data that are gone through again to find a place in it: a minute at most."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> Any: ...


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


def read_prompts(args: DataArgs, tokenizer: ChatTokenizer, max_tokens: int) -> list[Prompt]:
    """Read, template and tokenize every row; rows over `max_tokens` tokens are left out and counted in the log.

    Raises:
        ConfigError: no such file, task or column, an unreadable row, or no prompt short enough.
    """
    prompts: list[Prompt] = []
    too_long = 0
    for name in (args.file_name,) if isinstance(args.file_name, str) else args.file_name:
        for i, row in enumerate(_rows(name, args)):
            messages = _messages(row.pop("messages"), f"{name}: row {i}")
            try:
                encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # a template is a program of its own: whatever it raises is about this row
                raise ConfigError(f"{name}: row {i} does not fit the chat template: {error}") from error
            ids = tuple(encoded["input_ids"])
            if len(ids) > max_tokens:
                too_long += 1
                continue
            if not ids:
                raise ConfigError(f"{name}: row {i} is an empty prompt")
            prompt_id = str(row.pop("id", None) or f"{Path(name.removeprefix(BUNDLED)).stem}-{i}")
            prompts.append(Prompt(prompt_id=prompt_id, text=messages[-1]["content"], token_ids=ids, **row))
    if too_long:
        logger.warning(
            "%d of %d prompts are longer than prompt_length (%d tokens) and were left out",
            too_long,
            too_long + len(prompts),
            max_tokens,
        )
    if not prompts:
        raise ConfigError(
            f"actor_train.data_args.file_name ({args.file_name!r}): no prompt of at most "
            f"prompt_length={max_tokens} tokens"
        )
    return prompts


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """The chat of a row; ROLL's data holds it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{where}: the messages are text that is not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise ConfigError(f"{where}: the messages are no list of {{role, content}}")
    return value


def _rows(name: str, args: DataArgs) -> Iterator[dict[str, Any]]:
    """Rows of one source as {messages, ground_truth, domain?, id?}."""
    if name.startswith(BUNDLED):
        task = BUNDLED_TASKS.get(name.removeprefix(BUNDLED))
        if task is None:
            known = ", ".join(BUNDLED + k for k in sorted(BUNDLED_TASKS))
            raise ConfigError(f"actor_train.data_args.file_name: {name!r} is not a bundled task; there are {known}")
        for prompt, answer in task():
            yield {"messages": [{"role": "user", "content": prompt}], "ground_truth": answer}
        return
    reader = READERS.get(Path(name).suffix)
    if reader is None or not is_file(Path(name)):
        raise ConfigError(
            f"actor_train.data_args.file_name: {name!r} is not an existing {' or '.join(READERS)} file "
            f"(nor {BUNDLED}TASK)"
        )
    from datasets import load_dataset  # noqa: PLC0415  seconds to import, and the bundled tasks do without

    dataset = load_dataset(reader, data_files=name, split="train")
    columns = {
        "prompt": args.messages or args.prompt,
        "ground_truth": args.ground_truth,
        "domain": args.domain,
        "id": args.id,
    }
    missing = [f"{k}: {v}" for k, v in columns.items() if v and v not in dataset.column_names]
    if missing:
        raise ConfigError(
            f"{name} has no column for actor_train.data_args.{', '.join(missing)}; "
            f"it has {', '.join(dataset.column_names)}"
        )
    for row in dataset:
        value = row[columns["prompt"]]
        out = {
            "messages": value if args.messages else [{"role": "user", "content": str(value)}],
            "ground_truth": str(row[args.ground_truth]),
        }
        if args.domain:
            out["domain"] = str(row[args.domain])
        if args.id:
            out["id"] = str(row[args.id])
        yield out


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
