"""The call of a reward rule: the values that it may ask for by name, and the parameter that each of them fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from inspect import Parameter, Signature
from typing import Any


@dataclass(frozen=True)
class Response:
    """One response to be scored. Each field is offered to a rule under its name."""

    response: str
    """Its text."""
    ground_truth: str
    domain: str
    prompt: str
    """Text of the prompt's last message."""
    messages: Sequence[Mapping[str, str]]
    """The whole prompt, as {role, content}."""
    row: Mapping[str, Any]
    """Every column of the prompt's row in the data."""
    finish_reason: str
    """stop: it ended by itself; length: it was cut off."""
    num_response_tokens: int
    """The end token counted."""

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """The fields of these names, as a rule gets them."""
        values = {name: getattr(self, name) for name in names}
        if "messages" in values:
            values["messages"] = [dict(message) for message in self.messages]
        if "row" in values:
            values["row"] = dict(self.row)
        return values


OFFERED = tuple(field.name for field in fields(Response))
_BY_POSITION = ("response", "ground_truth")
"""Values of the first two parameters if their names are not among those offered."""
_CLOSE = 0.8
"""Similarity from which a name is taken for a misspelt one: rows for row."""


@dataclass(frozen=True)
class _Asked:
    """A parameter that gets an offered value."""

    name: str


class CallError(ValueError):
    """A rule cannot be called."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """
        Args:
            problems: (field of the rule's section, why) each.
        """
        super().__init__("; ".join(f"{field}: {why}" for field, why in problems))
        self.problems = problems


@dataclass(frozen=True)
class Call:
    """Call of a rule: every argument is an offered value or a constant."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the offered values that it needs, each once."""
        arguments = (*self.positional, *self.named.values())
        return tuple(dict.fromkeys(a.name for a in arguments if isinstance(a, _Asked)))

    def __call__(self, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """The function's answer, given the values of the names in `asked`."""

        def filled(argument: Any) -> Any:
            return values[argument.name] if isinstance(argument, _Asked) else argument

        named = {name: filled(argument) for name, argument in self.named.items()}
        return function(*map(filled, self.positional), **named)


def call_of(signature: Signature | None, kwargs: Mapping[str, Any]) -> Call:
    """The call of a function with this signature. A parameter with an offered name gets that value.

    Of the first two parameters those with other names get the response and the ground truth by position, as in
    `rule(answer, truth, **kwargs)`.

    Args:
        signature: None where Python knows none: the call is `rule(response, ground_truth, **kwargs)`.

    Raises:
        CallError: a parameter without a value, or an entry of `kwargs` without a parameter; all of them.
    """
    problems = [
        (f"kwargs.{name}", f"rules are offered a value of this name: rename it; offered are {', '.join(OFFERED)}")
        for name in kwargs
        if name in OFFERED
    ]
    if signature is None:
        positional, named = [*map(_Asked, _BY_POSITION)], dict(kwargs)
    else:
        positional, named, found = _filled(list(signature.parameters.values()), kwargs)
        problems += found
    if problems:
        raise CallError(problems)
    return Call(tuple(positional), named)


def _filled(
    parameters: Sequence[Parameter], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], list[tuple[str, str]]]:
    """Arguments by position, arguments by name, and what is wrong."""
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
                positional.append(_Asked(stands_for))
            continue
        if p.kind is Parameter.VAR_KEYWORD:
            continue
        if p.name in OFFERED:
            argument = _Asked(p.name)
        elif p.name in left and p.kind is not Parameter.POSITIONAL_ONLY:
            argument = left.pop(p.name)
        elif stands_for is not None:
            argument = _Asked(stands_for)
            if meant := [name for name in get_close_matches(p.name, OFFERED, 1, _CLOSE) if name != stands_for]:
                problems.append(("reward", _misspelt(p.name, stands_for, meant[0])))
        elif argument is Parameter.empty:
            problems.append(("reward", _lacking(p.name)))
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
    """Value of the next parameter by position, whatever its name: the ground truth follows the response only."""
    if len(before) >= len(_BY_POSITION) or list(before) != [*map(_Asked, _BY_POSITION[: len(before)])]:
        return None
    name = _BY_POSITION[len(before)]
    return None if name in names else name


def _misspelt(name: str, stands_for: str, meant: str) -> str:
    return f"its parameter {name!r} would get {stands_for} by its place: write {meant}, or a name less like it"


def _lacking(name: str) -> str:
    return (
        f"its parameter {name!r} has no default, and is neither among its kwargs nor offered; offered are "
        f"{', '.join(OFFERED)}"
    )
