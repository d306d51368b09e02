"""Prompts of an evaluation: a set for each file of `validation.data_args`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from roll_r3.config.workers import DataArgs
from roll_r3.data.chat import ChatTokenizer
from roll_r3.data.faults import Faults
from roll_r3.data.prompts import Prompt, raise_if_any, read_prompts
from roll_r3.data.sources import files_of, names_of, stem_of

logger = logging.getLogger(__name__)

SECTION = "validation.data_args"


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts evaluated together."""

    name: str
    """Name in metrics: the file's, without directory and suffix; later files of one name get -2, -3 ..."""
    prompts: Sequence[Prompt]


def read_evaluation_sets(
    args: DataArgs, tokenizer: ChatTokenizer, max_tokens: int, say: Callable[[str], None] = logger.info
) -> list[EvaluationSet]:
    """Read and tokenize every set; prompts longer than `max_tokens` are skipped.

    Args:
        say: receives the messages of `read_prompts`.

    Raises:
        ConfigError: the faults of the files; or a set without a prompt of at most `max_tokens`.
    """
    faults = Faults()
    files = list(files_of(names_of(args.file_name), faults))
    raise_if_any(faults, SECTION)
    return [
        EvaluationSet(
            name,
            read_prompts(
                args.model_copy(update={"file_name": file}),
                tokenizer,
                max_tokens,
                lambda text, name=name: say(f"evaluation set {name}: {text}"),  # type: ignore[misc]
                section=SECTION,
            ),
        )
        for name, file in zip(set_names(files), files, strict=True)
    ]


def set_names(files: Sequence[str]) -> list[str]:
    """Return a different name for each file."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for file in files:
        stem = stem_of(file)
        while (name := stem if not seen[stem] else f"{stem}-{seen[stem] + 1}") in names:
            seen[stem] += 1
        seen[stem] += 1
        names.append(name)
    return names
