"""Checks of verifiable instructions: each tells if a text keeps one instruction.

Instructions: Zhou et al., arXiv 2311.07911, and their form in the data RLVR-IFeval, read by ROLL's worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_SENTENCE_END = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=[.?!])\s+")
_BULLET = re.compile(r"^[^\S\n]*(?:\*[^*]|-)", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
_FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)
_RESPONSES_MARK = "******"


def holds(actual: int, relation: str, count: int, tolerance: int = 0) -> bool:
    """Compare a number with the one of an instruction.

    Raises:
        ValueError: unknown relation.
    """
    match relation:
        case "at least":
            return actual >= count
        case "at most":
            return actual <= count
        case "less than":
            return actual < count
        case "exactly":
            return actual == count
        case "around":
            return abs(actual - count) <= tolerance
    raise ValueError(f"unknown relation {relation!r}")


def keywords(text: str, words: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in words)


def keyword_frequency(text: str, word: str, count: int, relation: str = "exactly") -> bool:
    found = re.findall(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower())
    return holds(len(found), relation, count)


def forbidden_words(text: str, words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in words)


def letter_frequency(text: str, letter: str, count: int, relation: str = "exactly", any_case: bool = False) -> bool:
    if any_case:
        text, letter = text.lower(), letter.lower()
    return holds(text.count(letter), relation, count)


def response_language(text: str, language: str) -> bool:
    """Detect the language with langdetect, always with the same seed."""
    from langdetect import DetectorFactory, LangDetectException, detect  # noqa: PLC0415  optional

    DetectorFactory.seed = 0
    try:
        return bool(detect(text) == language)
    except LangDetectException:  # no letters
        return False


def marked_paragraphs(text: str, count: int, mark: str = "* * *") -> bool:
    """Check the number of paragraphs between marks; none may be empty."""
    parts = text.split(mark)
    return len(parts) == count and all(part.strip() for part in parts)


def number_words(text: str, count: int, relation: str) -> bool:
    return holds(len(text.split()), relation, count, tolerance=max(round(count * 0.1), 1))


def number_sentences(text: str, count: int, relation: str) -> bool:
    return holds(len(_SENTENCE_END.split(text.strip())), relation, count, tolerance=1)


def paragraph_begins(text: str, count: int, index: int, word: str) -> bool:
    """Check the number of paragraphs between empty lines, and the beginning of one, counted from 1."""
    paragraphs = [part.strip() for part in re.split(r"\n\n+", text.strip())]
    return len(paragraphs) == count >= index >= 1 and paragraphs[index - 1].lower().startswith(word.lower())


def postscript(text: str, marker: str) -> bool:
    _, found, rest = text.partition(marker)
    return bool(found and rest.strip())


def placeholders(text: str, count: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= count


def bullet_points(text: str, count: int) -> bool:
    return len(_BULLET.findall(text)) == count


def title(text: str) -> bool:
    lines = (line[: line.rfind(">>") + 2] for line in text.split("\n"))  # else every << is looked up to the end
    return any(name.strip() for line in lines for name in re.findall(r"<<(.+?)>>", line))


def one_of(text: str, options: Sequence[str]) -> bool:
    return text.strip().strip(".").lower() in [option.strip().strip(".").lower() for option in options]


def constrained_response(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def highlighted_sections(text: str, count: int) -> bool:
    return sum(any(part.strip() for part in found) for found in _HIGHLIGHT.findall(text)) >= count


def sections(text: str, count: int, marker: str, relation: str = "exactly") -> bool:
    return holds(len(re.findall(re.escape(marker), text)), relation, count)


def json_format(text: str) -> bool:
    """Check for JSON as a whole, fenced or not."""
    fenced = _FENCE.fullmatch(text.strip())
    try:
        json.loads(fenced[1].strip() if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def repeats_prompt(text: str, prompt: str) -> bool:
    return text.strip().lower().startswith(prompt.strip().lower())


def two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split(_RESPONSES_MARK)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def uppercase(text: str) -> bool:
    return text.isupper()


def lowercase(text: str) -> bool:
    return text.islower()


def capital_words(text: str, count: int, relation: str) -> bool:
    return holds(len(re.findall(r"\b[A-Z]+\b", text)), relation, count)


def ends_with(text: str, phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(text: str) -> bool:
    return "," not in text
