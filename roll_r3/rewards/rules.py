"""Rules that decide a response's reward: built in by name, or `package.module:function` of the user's own.

A rule is called in a process of `roll_r3.rewards.worker`, with what it asks for (see `roll_r3.rewards.calls`) and its
kwargs. This module is imported there, and imports nothing heavy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from roll_r3.errors import ConfigError
from roll_r3.rewards.calls import Call, CallError, call_of

BUILT_IN = {"exact_match": "roll_r3.rewards.rules:exact_match", "math": "roll_r3.rewards.math_rule:math"}
"""Name -> `package.module:function`."""
TRUTH_CHECKS = {"math": "roll_r3.rewards.math_rule:can_be_matched"}
"""Built-in name -> the rule that scores a ground truth 1 if some response can match it, else 0."""


class Undecided(BaseException):
    """A judge gave up on a response, which scores 0. No `except Exception` of a library on the way may swallow it."""


@dataclass(frozen=True)
class Rule:
    """What a process needs to know of one entry of `rewards`."""

    name: str
    """Its key there."""
    reward: str
    """Built-in name or `package.module:function`."""
    kwargs: Mapping[str, Any]
    timeout: float
    """Seconds for one response, after which its process is killed."""
    judge: bool = False
    """A response that is the end of its process, in whatever way, scores 0: no failure, since the rule is our own."""

    def __str__(self) -> str:
        return f"rewards.{self.name} ({self.reward})"

    def find(self) -> Callable[..., Any]:
        """Import the function. Whatever the module itself raises comes through.

        Raises:
            ConfigError: there is no such module or function.
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
        """Call of the function.

        Raises:
            ConfigError: it cannot be called with what is offered and its kwargs.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some that are written in C have none
            signature = None
        try:
            return call_of(signature, self.kwargs)
        except CallError as error:
            raise ConfigError(
                "\n".join(f"rewards.{self.name}.{field}: {self.reward}: {why}" for field, why in error.problems)
            ) from error


def exact_match(response: str, ground_truth: str) -> float:
    """1 if the response is the ground truth, white space at both ends aside; else 0."""
    return float(response.strip() == ground_truth.strip())


def as_score(value: object) -> float:
    """What a rule returned, as a float.

    Raises:
        ValueError: it is no number (text that looks like one is none), or not finite.
    """
    if not hasattr(type(value), "__float__"):
        raise ValueError(f"returned {'None' if value is None else f'a {type(value).__name__}'}, which is no number")
    score = float(value)  # type: ignore[arg-type]
    if not math.isfinite(score):
        raise ValueError(f"returned {score}")
    return score
