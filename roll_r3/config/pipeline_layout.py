"""megatron-core's text for which layers a pipeline stage holds, such as `Et*3|t*2|t*2L`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from roll_r3.config.report import show_value

MAX_TEXT = 4096
"""Characters of a layout as it is written."""
MAX_LETTERS = 100_000
"""Letters and `|` that a layout may stand for: more than any model has layers, and any pipeline stages."""

_GROUPS = re.compile(r"\(([^()]+)\)\*(\d+)")
_LETTERS = re.compile(r"(.)\*(\d+)")
_TOO_MANY = re.compile(r"\d{7}")
"""A number beyond MAX_LETTERS."""


def parse_pipeline_layout(text: str) -> tuple[str, ...]:
    """The letters of each stage, in the order of the pipeline: E embedding, t a decoder layer, L the loss.

    `|` ends a stage, `x*n` and `(...)*n` repeat a letter or a group (which may hold `|`), commas mean nothing. A stage
    may be empty.

    Raises:
        ValueError: another letter, not exactly one E as the first letter and one L as the last, or a text that is, or
            stands for, one too long.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{show_value(text)!r} is {len(text):,} characters long, at most {MAX_TEXT:,} are read")
    whole = text.replace(",", "")
    for pattern in (_GROUPS, _LETTERS):
        whole = _repeated(pattern, whole, text)
    if unknown := sorted(set(whole) - set("EtL|")):
        raise ValueError(
            f"{show_value(text)!r} holds {show_value(' '.join(map(repr, unknown)))}: write E for the embedding, t for "
            "a decoder layer, L for the loss, | between stages, t*3 or (tt|)*3 to repeat"
        )
    letters = whole.replace("|", "")
    if not re.fullmatch("Et*L", letters):
        raise ValueError(
            f"{show_value(text)!r}: the first letter must be the only E (embedding), the last the only L (loss)"
        )
    return tuple(whole.split("|"))


def _repeated(pattern: re.Pattern[str], whole: str, text: str) -> str:
    """`whole` with every match of (what)*(how often) written out; `text` is what the user wrote."""
    # How long it becomes is known before it is made: a few digits can ask for more than any memory holds.
    if _TOO_MANY.search(whole) or (
        len(whole) + sum(len(match[1]) * int(match[2]) for match in pattern.finditer(whole)) > MAX_LETTERS
    ):
        raise ValueError(f"{show_value(text)!r} stands for more than {MAX_LETTERS:,} letters: write smaller numbers")
    return pattern.sub(lambda match: match[1] * int(match[2]), whole)


def _checked(text: str) -> str:
    parse_pipeline_layout(text)
    return text


PipelineLayout = Annotated[str, AfterValidator(_checked)]
"""Text that `parse_pipeline_layout` can read."""
