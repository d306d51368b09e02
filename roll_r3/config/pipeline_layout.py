"""Parser of megatron-core's pipeline layouts, such as `Et*3|t*2|t*2L`: the layers of every stage."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from roll_r3.config.findings.report import show_value

MAX_TEXT = 4096
"""Largest length of a layout as written."""
MAX_LETTERS = 100_000
"""Largest length of a layout with repetitions written out: above the layers and stages of any model."""

_GROUPS = re.compile(r"\(([^()]+)\)\*(\d+)")
_LETTERS = re.compile(r"(.)\*(\d+)")
_TOO_MANY = re.compile(r"\d{7}")
"""A number above MAX_LETTERS."""


def parse_pipeline_layout(text: str) -> tuple[str, ...]:
    """Return the letters of each stage, in pipeline order: E embedding, t a decoder layer, L the loss.

    `|` ends a stage; `x*n` and `(...)*n` repeat a letter or a group, with or without `|`; commas are ignored. A stage
    may be empty.

    Raises:
        ValueError: another letter, not exactly one E (first) and one L (last), or a text above `MAX_TEXT` or
            `MAX_LETTERS`.
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
    """Return `whole` with every match of (letters)*(count) written out; `text` is the layout as written."""
    # A few digits can ask for more than any memory holds, so the length is computed first.
    if _TOO_MANY.search(whole) or (
        len(whole) + sum(len(match[1]) * int(match[2]) for match in pattern.finditer(whole)) > MAX_LETTERS
    ):
        raise ValueError(f"{show_value(text)!r} stands for more than {MAX_LETTERS:,} letters: write smaller numbers")
    return pattern.sub(lambda match: match[1] * int(match[2]), whole)


def _checked(text: str) -> str:
    parse_pipeline_layout(text)
    return text


PipelineLayout = Annotated[str, AfterValidator(_checked)]
"""Text accepted by `parse_pipeline_layout`."""
