"""Values requested by a rule, by name and by position, and impossible calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from roll_r3.config.rewards import RewardConfig
from roll_r3.errors import ConfigError
from roll_r3.rewards.functions import OFFERED, CallError, Response, call_of
from roll_r3.rewards.rules import Rule

RESPONSE = Response(
    response="R",
    ground_truth="T",
    domain="D",
    prompt="P",
    messages=({"role": "user", "content": "P"},),
    row={"tests": [1, 2]},
    finish_reason="length",
    num_response_tokens=7,
)
MESSAGES = [{"role": "user", "content": "P"}]
ROW = {"tests": [1, 2]}


def called(function: Callable[..., Any], **kwargs: Any) -> Any:
    """Call the function with its requested values only."""
    call = call_of(inspect.signature(function), kwargs)
    return call(function, RESPONSE.values(call.requested))


@pytest.mark.parametrize(
    ("function", "kwargs", "got"),
    [
        (lambda response, ground_truth: (response, ground_truth), {}, ("R", "T")),
        (lambda answer, truth: (answer, truth), {}, ("R", "T")),
        (lambda answer, truth="x", letter="a": (answer, truth, letter), {"letter": "b"}, ("R", "T", "b")),
        (lambda answer, truth, /, **kwargs: (answer, truth, kwargs), {"truth": 1}, ("R", "T", {"truth": 1})),
        (lambda *args, **kwargs: (args, kwargs), {"letter": "b"}, (("R", "T"), {"letter": "b"})),
        (lambda *args, row: (args, row), {}, (("R", "T"), ROW)),
        (lambda answer, *args: (answer, args), {}, ("R", ("T",))),
        (lambda row, *args: (row, args), {}, (ROW, ())),
        (lambda response, ground_truth, **kwargs: kwargs, {}, {}),
        (lambda response: response, {}, "R"),
        (lambda responses, ground_truths: (responses, ground_truths), {}, ("R", "T")),
        (lambda row: row, {}, ROW),
        (lambda response, row: (response, row), {}, ("R", ROW)),
        (lambda answer, messages: (answer, messages), {}, ("R", MESSAGES)),
        (lambda ground_truth, response: (ground_truth, response), {}, ("T", "R")),
        (lambda response, *, prompt=None, domain=None: (response, prompt, domain), {}, ("R", "P", "D")),
        (lambda response, threshold: (response, threshold), {"threshold": 2}, ("R", 2)),
        (lambda response, truth, row=None, /: (response, truth, row), {}, ("R", "T", ROW)),
        (lambda finish_reason, num_response_tokens: (finish_reason, num_response_tokens), {}, ("length", 7)),
        (lambda a, b, c=3, *, d=4, **e: (a, b, c, d, e), {"f": 1}, ("R", "T", 3, 4, {"f": 1})),
    ],
)
def test_a_parameter_is_filled_by_name_or_position(function: Any, kwargs: Any, got: Any) -> None:
    assert called(function, **kwargs) == got


@pytest.mark.parametrize(
    ("function", "requested"),
    [
        (lambda answer, truth, **kwargs: 0, {"response", "ground_truth"}),
        (lambda response, row: 0, {"response", "row"}),
        (lambda response, ground_truth, *, prompt="": 0, {"response", "ground_truth", "prompt"}),
        (lambda domain: 0, {"domain"}),
    ],
)
def test_only_requested_values_are_sent(function: Any, requested: set[str]) -> None:
    assert set(call_of(inspect.signature(function), {}).requested) == requested


@pytest.mark.parametrize(
    ("function", "kwargs", "problems"),
    [
        (lambda response, truth, letter: 0, {}, [("reward", "its parameter 'letter' has no default")]),
        (lambda response, truth, *, letter: 0, {}, [("reward", "its parameter 'letter' has no default")]),
        (lambda source, answer, ground_truth: 0, {}, [("reward", "its parameter 'answer' has no default")]),
        (
            lambda response, rows: 0,
            {},
            [("reward", "its parameter 'rows' would get ground_truth by position: rename it to row")],
        ),
        (lambda prompt, completion: 0, {}, [("reward", "its parameter 'completion' has no default")]),
        (lambda response, row: 0, {"row": 1}, [("kwargs.row", "the name is reserved for an offered value")]),
        (lambda response, **kwargs: 0, {"prompt": 1}, [("kwargs.prompt", "the name is reserved for an offered value")]),
        (
            lambda response, a, b, c: 0,
            {"d": 1, "row": 2},
            [
                ("kwargs.row", "the name is reserved"),
                ("reward", "its parameter 'b'"),
                ("reward", "its parameter 'c'"),
                ("kwargs.d", "the function has no"),
            ],
        ),
    ],
)
def test_an_impossible_call_is_rejected_with_every_reason(function: Any, kwargs: Any, problems: Any) -> None:
    with pytest.raises(CallError) as refused:
        call_of(inspect.signature(function), kwargs)
    assert [field for field, _ in refused.value.problems] == [field for field, _ in problems]
    assert all(why.startswith(start) for (_, why), (_, start) in zip(refused.value.problems, problems, strict=True))
    text = str(refused.value)
    assert all(name in text for name in OFFERED) or "offered are" not in text


def test_a_function_without_a_signature_gets_response_and_truth() -> None:
    call = call_of(None, {"letter": "b"})
    assert call(lambda *args, **kwargs: (args, kwargs), RESPONSE.values(call.requested)) == (
        ("R", "T"),
        {"letter": "b"},
    )


def test_an_error_names_the_field_and_the_function() -> None:
    rule = Rule("mine", "my.rules:score", {"row": 1, "other": 2}, 1.0)
    with pytest.raises(ConfigError) as refused:
        rule.call_of(lambda response, needed, more: 0)
    assert [line.split(": ")[:2] for line in str(refused.value).splitlines()] == [
        ["rewards.mine.kwargs.row", "my.rules:score"],
        ["rewards.mine.reward", "my.rules:score"],
        ["rewards.mine.kwargs.other", "my.rules:score"],
    ]


def test_the_configuration_names_all_that_is_offered() -> None:
    described = RewardConfig.model_fields["reward"].description or ""
    assert all(f"`{name}`" in described for name in OFFERED)
