"""Named questions to a judge, and the placeholders of every question."""

from __future__ import annotations

import re

_MATCH = """\
Compare a solution with a reference answer.

Question:
{prompt}

Solution (it may be incomplete; its last statement counts):
{response}

Reference answer (a letter, a number, an expression, a phrase or a list, in any language):
{ground_truth}

Does the solution's final answer have the meaning of the reference answer? An unclear, missing or different answer does
not. Write one word: YES or NO."""
_RATING = """\
Rate a response to a prompt.

Prompt:
{prompt}

Response:
{response}

Reference, if there is one:
{ground_truth}

Judge if the response is correct, complete, clear and to the point. Write a number from 0 (useless) to 10 (perfect) as
\\boxed{number}."""

NAMED = {"match": _MATCH, "Qwen2.5-7B-Instruct-RLVR-prompt": _MATCH, "rating": _RATING}
"""Name -> question; ROLL's name has the same purpose and verdict, in other words."""
_FIELDS = {"prompt": "prompt", "question": "prompt", "response": "response", "ground_truth": "ground_truth"}
_FIELDS["reference"] = "ground_truth"
_PLACEHOLDER = re.compile("{(" + "|".join(_FIELDS) + ")}")


def placeholders(text: str) -> set[str]:
    """Return the requested values of a question: prompt, response, ground_truth."""
    return {_FIELDS[name] for name in _PLACEHOLDER.findall(text)}


def question(name: str, *, prompt: str, response: str, ground_truth: str) -> str:
    """Return a question, by its name or as a text, with its placeholders filled. Other braces stay as they are."""
    values = {"prompt": prompt, "response": response, "ground_truth": ground_truth}
    return _PLACEHOLDER.sub(lambda found: values[_FIELDS[found[1]]], NAMED.get(name, name))
