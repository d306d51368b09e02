"""Language of the docstrings: plain technical English, measured."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import roll_r3

HABIT_WORDS = re.compile(r"\b(that|which|what|who|whom|whose|whoever|whatever)\b", re.IGNORECASE)
OPENINGS = re.compile(
    r"(What|Who|Whose|Whom|Whoever|Whatever|Whether|How|Which|Where|When|Why|Of|That)\b", re.IGNORECASE
)
MAX_RATE = 12.0
"""Habit words per 1,000 words of docstrings."""
SHOWN = 10
"""Number of files listed when the rate is too high."""


@dataclass(frozen=True)
class Docstring:
    """Docstring of a module, class or function, or string below a field."""

    file: Path
    line: int
    text: str

    @property
    def words(self) -> int:
        """Number of words."""
        return len(re.findall(r"[A-Za-z0-9_'-]+", self.text))

    @property
    def habit_words(self) -> int:
        """Number of habit words."""
        return len(HABIT_WORDS.findall(self.text))


def docstrings(folder: Path) -> Iterator[Docstring]:
    """Yield all docstrings of the Python files below a folder."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            body = getattr(node, "body", None)
            for statement in body if isinstance(body, list) else []:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield Docstring(file, statement.lineno, text)


def wrong_openings(found: list[Docstring]) -> list[str]:
    """Return file:line and first line of each docstring beginning with neither a noun nor a verb."""
    return [f"{d.file}:{d.line}: {d.text.strip().splitlines()[0]}" for d in found if OPENINGS.match(d.text.strip())]


def rate(found: list[Docstring]) -> float:
    """Return the number of habit words per 1,000 words."""
    return 1000 * sum(d.habit_words for d in found) / max(sum(d.words for d in found), 1)


def worst(found: list[Docstring]) -> list[str]:
    """Return the files with the most habit words, with their numbers."""
    files: dict[Path, list[Docstring]] = {}
    for docstring in found:
        files.setdefault(docstring.file, []).append(docstring)
    counts = sorted(((sum(d.habit_words for d in inside), file) for file, inside in files.items()), reverse=True)
    return [f"{file}: {count} habit words, {rate(files[file]):.0f} per 1,000" for count, file in counts[:SHOWN]]


@pytest.fixture(scope="module")
def written() -> list[Docstring]:
    """All docstrings of roll_r3."""
    return list(docstrings(Path(roll_r3.__file__).parent))


def test_docstrings_begin_with_a_noun_or_a_verb(written: list[Docstring]) -> None:
    assert not (wrong := wrong_openings(written)), "begin with a noun or a verb:\n" + "\n".join(wrong)


def test_habit_words_are_rare(written: list[Docstring]) -> None:
    found = rate(written)
    assert found < MAX_RATE, f"{found:.1f} of {HABIT_WORDS.pattern} per 1,000 words:\n" + "\n".join(worst(written))


def test_all_kinds_of_docstrings_are_read(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text(
        '"""What a module is."""\n'
        "X = 1\n"
        '"""Of a constant."""\n'
        "class A:\n"
        '    """Class that counts."""\n'
        "    field: int\n"
        '    """How many."""\n'
        "    def method(self):\n"
        '        """whether it is."""\n'
        "        if self.field:\n"
        "            async def inner():\n"
        '                """Offered to nobody; whatsoever is no habit word."""\n'
    )
    found = list(docstrings(tmp_path))
    assert len(found) == 6
    assert [text.rpartition(": ")[2] for text in wrong_openings(found)] == [
        "What a module is.",
        "Of a constant.",
        "How many.",
        "whether it is.",
    ]
    assert wrong_openings(found)[0] == f"{tmp_path}/inner/a.py:1: What a module is."
    assert rate(found) == pytest.approx(1000 * 2 / 23)
    assert worst(found) == [f"{tmp_path}/inner/a.py: 2 habit words, 87 per 1,000"]
