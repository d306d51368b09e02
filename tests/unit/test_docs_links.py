"""Links and paths in the project's own pages lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
FOLDERS = ("configs", "docs", "examples", "roll_r3", "tests")
FILES = [
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_file_has_one(page):
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    files = [target for target in targets if target and "://" not in target]
    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_path_in_a_page_exists(page):
    text = page.read_text().partition("\n## Not built yet")[0]
    named = {path.rstrip("/") for path in re.findall(r"`([\w./-]+(?:\.py|/))`", text)}
    assert sorted(path for path in named if not any(f"/{file}".endswith(f"/{path}") for file in FILES)) == []
