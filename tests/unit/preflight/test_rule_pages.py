"""Rules as text: the list in docs/compatibility.md. Pages for `--explain` are tested with the command line."""

from __future__ import annotations

from roll_r3.preflight.rule_pages import render_list
from roll_r3.preflight.rules import ALL_RULES


def test_the_list_names_every_rule_in_few_words():
    text = render_list()
    assert all(text.count(f"`{row.id}`") == 1 for row in ALL_RULES)
    assert len(text.split()) < 3000


def test_rules_with_the_same_reason_share_a_line():
    lines = [line for line in render_list().splitlines() if line.startswith("- ")]
    reasons = [line.rpartition("`: ")[2] for line in lines if "(warning)" not in line]
    assert len(set(reasons)) == len(reasons)
    warned = next(line for line in lines if "`audit-needs-replay`" in line)
    assert warned.startswith("- `audit-needs-replay` (warning): ")
