"""Prompts: tokenized rows of the data files, drawn in an endless seeded order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_r3.config.workers import DataArgs
from roll_r3.data.chat import Chat, ChatTokenizer
from roll_r3.data.faults import DataError, Faults
from roll_r3.data.row_reader import Row, read_rows
from roll_r3.errors import ConfigError

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 15.0
"""Seconds between two progress messages of tokenizing."""


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
    args: DataArgs,
    tokenizer: ChatTokenizer,
    max_tokens: int,
    say: Callable[[str], None] = logger.info,
    *,
    section: str = "actor_train.data_args",
) -> list[Prompt]:
    """Read, template and tokenize all rows; skip prompts longer than `max_tokens`.

    Args:
        say: receives messages: progress, number of skipped rows, number of rows with their own system message.
        section: dotted path of `args`, for messages.

    Raises:
        ConfigError: the faults of all files; or no prompt is short enough.
    """
    faults = Faults()
    chat = Chat(tokenizer, args)
    rows = list(read_rows(args, faults))
    raise_if_any(faults, section)
    prompts = list(_tokenized(rows, chat, faults, say))
    raise_if_any(faults, section)
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if chat.own_system:
        say(f"{chat.own_system} of {len(rows)} rows keep their own system message instead of data_args.system_prompt")
    if not short:
        raise ConfigError(
            f"{section}.file_name ({args.file_name!r}): no prompt of at most prompt_length={max_tokens} "
            f"tokens; the shortest of {len(prompts)} has {min(len(prompt.token_ids) for prompt in prompts)}"
        )
    if long := len(prompts) - len(short):
        say(f"skipped {long} of {len(prompts)} prompts longer than prompt_length ({max_tokens} tokens)")
    return short


def raise_if_any(faults: Faults, section: str) -> None:
    """Raise ConfigError with all faults, if there are any."""
    if faults:
        raise ConfigError("\n  ".join([f"{section}: the data cannot be used:", *faults.lines()]))


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
