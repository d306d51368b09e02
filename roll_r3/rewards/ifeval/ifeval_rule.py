"""Built-in rule `ifeval`: verifiable instructions of the row (arXiv 2311.07911)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from roll_r3.rewards.ifeval.instructions import instructions_of
from roll_r3.rewards.texts import after_thought, repetition


def ifeval(
    response: str,
    ground_truth: str,
    row: Mapping[str, Any],
    *,
    reward_type: str = "strict",
    repetition_penalty: float = 0.0,
) -> float:
    """Return the score of the kept instructions, minus repetition_penalty x share of repeated 3-grams.

    The text behind the thought counts for the instructions, the whole response for repetition.

    Args:
        reward_type: strict: 1 if all are kept, else 0. loose: likewise, where each may be kept by the text without
            its asterisks, first line or last line. soft: share of kept ones.

    Raises:
        ValueError: the row's instructions cannot be read.
    """
    texts = [after_thought(response).strip()]
    if reward_type == "loose":
        texts = list(_variants(texts[0]))
    kept = [any(text and i.kept_by(text) for text in texts) for i in instructions_of(ground_truth, row)]
    score = sum(kept) / len(kept) if reward_type == "soft" else float(all(kept))
    return score - repetition_penalty * repetition(response)


def knows_instructions(ground_truth: str, row: Mapping[str, Any], **_: object) -> float:
    """Return 1 if the instructions of a row are known, and can be checked.

    Raises:
        ValueError: they are not, or cannot be read.
        Exception: a check fails, as its arguments have another type.
    """
    for instruction in instructions_of(ground_truth, row):
        instruction.kept_by("")
    return 1.0


def _variants(text: str) -> Iterator[str]:
    """Yield the text with and without its first line, last line and asterisks."""
    lines = text.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        for variant in ("\n".join(part), "\n".join(part).replace("*", "")):
            yield variant.strip()
