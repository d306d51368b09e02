"""Calls of reward rules: binding of the offered values and kwargs to a rule's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from inspect import Parameter, Signature
from typing import Any


@dataclass(frozen=True)
class Response:
    """Response to score. Each field is offered to a rule under its name."""

    response: str
    """Text of the response."""
    ground_truth: str
    domain: str
    prompt: str
    """Text of the prompt's last message."""
    messages: Sequence[Mapping[str, str]]
    """Messages of the prompt, as {role, content}."""
    row: Mapping[str, Any]
    """All columns of the prompt's row in the data."""
    finish_reason: str
    """stop: ended by the policy; length: truncated."""
    num_response_tokens: int
    """Number of tokens, end token included."""

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the fields with these names, as passed to a rule."""
        values = {name: getattr(self, name) for name in names}
        if "messages" in values:
            values["messages"] = [dict(message) for message in self.messages]
        if "row" in values:
            values["row"] = dict(self.row)
        return values


OFFERED = tuple(field.name for field in fields(Response))
_BY_POSITION = ("response", "ground_truth")
"""Values of the first two parameters if their names are not offered."""
_CLOSE = 0.8
"""Similarity above which a name counts as misspelt: rows for row."""


@dataclass(frozen=True)
class _Offered:
    """Argument filled with an offered value."""

    name: str


class CallError(ValueError):
    """Error: a rule cannot be called."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """
        Args:
            problems: (field of the rule's section, reason) of each.
        """
        super().__init__("; ".join(f"{field}: {why}" for field, why in problems))
        self.problems = problems


@dataclass(frozen=True)
class Call:
    """Arguments for a rule: offered values and constants."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def requested(self) -> tuple[str, ...]:
        """Names of the requested values, each once."""
        arguments = (*self.positional, *self.named.values())
        return tuple(dict.fromkeys(a.name for a in arguments if isinstance(a, _Offered)))

    def __call__(self, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Call the function.

        Args:
            values: values of all names in `requested`.
        """

        def filled(argument: Any) -> Any:
            return values[argument.name] if isinstance(argument, _Offered) else argument

        named = {name: filled(argument) for name, argument in self.named.items()}
        return function(*map(filled, self.positional), **named)


def call_of(signature: Signature | None, kwargs: Mapping[str, Any]) -> Call:
    """Return the call of a function with this signature. A parameter with an offered name gets this value.

    The first two parameters, where they have other names, get the response and the ground truth by position, as in
    `rule(answer, truth, **kwargs)`.

    Args:
        signature: None if unknown to Python: the call is `rule(response, ground_truth, **kwargs)`.

    Raises:
        CallError: parameters without a value, or entries of `kwargs` without a parameter; lists all of them.
    """
    problems = [
        (f"kwargs.{name}", f"the name is reserved for an offered value: rename it; offered are {', '.join(OFFERED)}")
        for name in kwargs
        if name in OFFERED
    ]
    if signature is None:
        positional, named = [*map(_Offered, _BY_POSITION)], dict(kwargs)
    else:
        positional, named, found = _filled(list(signature.parameters.values()), kwargs)
        problems += found
    if problems:
        raise CallError(problems)
    return Call(tuple(positional), named)


def _filled(
    parameters: Sequence[Parameter], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], list[tuple[str, str]]]:
    """Return positional arguments, named arguments, and problems."""
    names = {p.name for p in parameters}
    left = {name: value for name, value in kwargs.items() if name not in OFFERED}
    positional: list[Any] = []
    named: dict[str, Any] = {}
    problems = []
    for p in parameters:
        by_position = p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        stands_for = _by_position(positional, names) if by_position else None
        argument: Any = p.default
        if p.kind is Parameter.VAR_POSITIONAL:
            while (stands_for := _by_position(positional, names)) is not None:
                positional.append(_Offered(stands_for))
            continue
        if p.kind is Parameter.VAR_KEYWORD:
            continue
        if p.name in OFFERED:
            argument = _Offered(p.name)
        elif p.name in left and p.kind is not Parameter.POSITIONAL_ONLY:
            argument = left.pop(p.name)
        elif stands_for is not None:
            argument = _Offered(stands_for)
            if meant := [name for name in get_close_matches(p.name, OFFERED, 1, _CLOSE) if name != stands_for]:
                problems.append(("reward", _misspelt(p.name, stands_for, meant[0])))
        elif argument is Parameter.empty:
            problems.append(("reward", _without_value(p.name)))
        if by_position:
            positional.append(argument)
        else:
            named[p.name] = argument
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        named |= left
    else:
        problems += [(f"kwargs.{name}", "the function has no parameter of this name") for name in left]
    return positional, named, problems


def _by_position(before: Sequence[Any], names: set[str]) -> str | None:
    """Return the value for the next positional parameter: the response, then the ground truth."""
    if len(before) >= len(_BY_POSITION) or list(before) != [*map(_Offered, _BY_POSITION[: len(before)])]:
        return None
    name = _BY_POSITION[len(before)]
    return None if name in names else name


def _misspelt(name: str, stands_for: str, meant: str) -> str:
    return f"its parameter {name!r} would get {stands_for} by position: rename it to {meant}, or to a less similar name"


def _without_value(name: str) -> str:
    return (
        f"its parameter {name!r} has no default, is not in kwargs and is not offered; offered are {', '.join(OFFERED)}"
    )
