"""Parts of a response, and penalties, as ROLL's reward workers read and compute them."""

from __future__ import annotations

import re
from itertools import islice

THINK_END = "</think>"
_SOLUTION = "<|begin_of_solution|>"
_BOXED = re.compile(r"\\boxed\{([^}]+)\}")
_BLOCK = re.compile(r"```([\w+#.-]*)\s*(.*?)```", re.DOTALL)
_NGRAM = 3


def after_thought(text: str) -> str:
    """Return the text after the last `</think>`, without leading line breaks; the whole text if there is none."""
    return text.rpartition(THINK_END)[2].lstrip("\n") if THINK_END in text else text


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` up to its first closing brace; None if there is none."""
    found = _BOXED.findall(text[: text.rfind("}") + 1])  # else every open one is looked up to the end
    return found[-1] if found else None


def code_of(text: str) -> str:
    """Return the program in a response: its first fenced block with a function, else its first block, else the text.

    A response with an unfinished block only has no program.
    """
    text = text.rpartition(_SOLUTION)[2].rpartition(THINK_END)[2].strip()
    if "```" not in text:
        return text
    blocks = [block for _, block in _BLOCK.findall(text[: text.rfind("```") + 3])]
    return next((block for block in blocks if "def " in block), blocks[0] if blocks else "")


def repetition(text: str) -> float:
    """Return the share of repeated 3-grams of words among all 3-grams, 0 to 1."""
    words = text.lower().split()
    ngrams = list(zip(*(islice(words, start, None) for start in range(_NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
