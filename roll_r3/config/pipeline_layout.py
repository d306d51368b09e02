"""megatron-core's text for which layers a pipeline stage holds, such as `Et*3|t*2|t*2L`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_GROUPS = re.compile(r"\(([^)]+)\)\*(\d+)")
_LETTERS = re.compile(r"(.)\*(\d+)")


def parse_pipeline_layout(text: str) -> tuple[str, ...]:
    """The letters of each stage, in the order of the pipeline: E embedding, t a decoder layer, L the loss.

    `|` ends a stage, `x*n` and `(...)*n` repeat a letter or a group (which may hold `|`), commas mean nothing. A stage
    may be empty.

    Raises:
        ValueError: another letter, or not exactly one E as the first letter and one L as the last.
    """
    whole = text.replace(",", "")
    for pattern in (_GROUPS, _LETTERS):
        whole = pattern.sub(lambda match: match[1] * int(match[2]), whole)
    if unknown := sorted(set(whole) - set("EtL|")):
        raise ValueError(
            f"{text!r} holds {' '.join(map(repr, unknown))}: write E for the embedding, t for a decoder layer, L for "
            "the loss, | between stages, t*3 or (tt|)*3 to repeat"
        )
    letters = whole.replace("|", "")
    if not re.fullmatch("Et*L", letters):
        raise ValueError(f"{text!r}: the first letter must be the only E (embedding), the last the only L (loss)")
    return tuple(whole.split("|"))


def _checked(text: str) -> str:
    parse_pipeline_layout(text)
    return text


PipelineLayout = Annotated[str, AfterValidator(_checked)]
"""Text that `parse_pipeline_layout` can read."""
