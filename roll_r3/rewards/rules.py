"""Reward rules: built-in ones by name, and `package.module:function` of the user.

A rule is called in a process of `roll_r3.rewards.worker` with its requested values (`roll_r3.rewards.functions`) and
kwargs. This module is imported there, so it imports nothing heavy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from roll_r3.errors import ConfigError
from roll_r3.rewards.functions import Call, CallError, call_of

BUILT_IN = {
    "code": "roll_r3.rewards.code.code_rule:code",
    "exact_match": "roll_r3.rewards.rules:exact_match",
    "ifeval": "roll_r3.rewards.ifeval.ifeval_rule:ifeval",
    "math": "roll_r3.rewards.math_rule:math",
    "multiple_choice": "roll_r3.rewards.multiple_choice:multiple_choice",
}
"""Name of a built-in rule -> `package.module:function`. `llm_judge` is asked by `roll_r3.rewards.judge`."""
TRUTH_CHECKS = {
    "code": "roll_r3.rewards.code.code_rule:has_tests",
    "ifeval": "roll_r3.rewards.ifeval.ifeval_rule:knows_instructions",
    "math": "roll_r3.rewards.math_rule:can_be_matched",
    "multiple_choice": "roll_r3.rewards.multiple_choice:is_letter",
}
"""Name of a built-in rule -> check of a row: 1 if a reward is possible; else it returns 0 or raises."""


class Undecided(BaseException):
    """Raised by a judge that cannot decide: the response scores 0.

    A BaseException, so that no `except Exception` in a library swallows it.
    """


@dataclass(frozen=True)
class Rule:
    """Entry of `rewards`, as sent to the processes."""

    name: str
    """Key in `rewards`."""
    reward: str
    """Built-in name or `package.module:function`."""
    kwargs: Mapping[str, Any]
    timeout: float
    """Seconds per response; the process is killed past them."""
    judge: bool = False
    """True for built-in judges: a response that ends the process scores 0 instead of failing."""

    def __str__(self) -> str:
        return f"rewards.{self.name} ({self.reward})"

    def find(self) -> Callable[..., Any]:
        """Import the function. Errors raised by the module itself are passed on.

        Raises:
            ConfigError: no such module or function.
        """
        field = f"rewards.{self.name}.reward"
        module, colon, attribute = BUILT_IN.get(self.reward, self.reward).partition(":")
        if not colon:
            raise ConfigError(f"{field}: {self.reward!r} is neither {', '.join(BUILT_IN)} nor package.module:function")
        try:
            function = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{field}: cannot import {self.reward!r}: {error}") from error
        if not callable(function):
            raise ConfigError(f"{field}: {self.reward!r} is not a function")
        return function  # type: ignore[no-any-return]

    def call_of(self, function: Callable[..., Any]) -> Call:
        """Return the call of the function.

        Raises:
            ConfigError: it cannot be called with the offered values and its kwargs.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions in C have none
            signature = None
        try:
            return call_of(signature, self.kwargs)
        except CallError as error:
            raise ConfigError(
                "\n".join(f"rewards.{self.name}.{field}: {self.reward}: {why}" for field, why in error.problems)
            ) from error


def exact_match(response: str, ground_truth: str) -> float:
    """Return 1 if the response equals the ground truth, ignoring white space at both ends, else 0."""
    return float(response.strip() == ground_truth.strip())


def as_score(value: object) -> float:
    """Convert a rule's return value to a float.

    Raises:
        ValueError: the value is not a number (text never is), or not finite.
    """
    if not hasattr(type(value), "__float__"):
        raise ValueError(f"must return a number, returned {'None' if value is None else f'a {type(value).__name__}'}")
    score = float(value)  # type: ignore[arg-type]
    if not math.isfinite(score):
        raise ValueError(f"must return a finite number, returned {score}")
    return score
