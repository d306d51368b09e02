"""A server's answer to one sample, checked: what must hold whatever the engine. Pure functions.

Shape legend: P prompt tokens, R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pybase64

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import FinishReason, Trajectory
from roll_r3.config.readable import readable
from roll_r3.engines.sampling import Sample, SampleError, SampleRequest
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.checks import check_log_probs, compact_routes

_ID_BYTES = 4
"""Of an expert's id, in the largest type that an engine uses."""
_TOKEN_BYTES = 4096
"""Room for a response token: its id, its log-probability with all that an engine says beside it, its text."""
_HEAD_BYTES = 1 << 20
"""Room for what an answer holds besides."""
_ROUTES = re.compile(rb'(?<!\\)"routed_experts"\s*:\s*"')
_START = 200
"""Bytes of an answer that a message shows."""
MISREAD = (ValueError, KeyError, TypeError, OverflowError, AttributeError)
"""What comes of reading an answer that is not in the form that it should have."""


@dataclass(frozen=True)
class Asked:
    """What an answer must be an answer to."""

    sample: SampleRequest
    max_new_tokens: int
    """An answer that was cut earlier than that is refused."""
    weight_version: int
    """Of the weights that must have produced every token."""
    record_routes: bool
    """Whether routes were asked for and must be there."""
    stop_strings: tuple[str, ...] = ()
    """The texts that may end the response."""

    def most_bytes(self, facts: ModelFacts) -> int:
        """What an answer can take at most, with room to spare: routes of the longest response in base64, and text."""
        rows = len(self.sample.prompt_ids) + self.max_new_tokens - 1 - self.sample.first_row
        routes = rows * facts.num_layers * facts.top_k * _ID_BYTES if self.record_routes else 0
        return 4 * (routes // 3 + 1) + self.max_new_tokens * _TOKEN_BYTES + _HEAD_BYTES


@dataclass(frozen=True)
class Answer:
    """What an engine said, under one set of names."""

    finish_reason: FinishReason
    ended_by: int | str | None
    """The end token or the stop string that ended the response; None where the engine does not name one."""
    response_ids_R: npt.NDArray[np.int32]
    log_prob_entries: Sequence[Sequence[Any]]
    """(log-probability, token id) of each sampled token; what else an entry holds is not looked at."""
    weight_versions: Sequence[str]
    """Every version that the engine says took part."""
    prompt_tokens: int
    """How many tokens of the prompt the engine saw."""
    cached_tokens: int
    """How many of them came from its prefix cache, for certain; 0 where it does not say."""


@contextmanager
def reading(what: str, body: bytes) -> Iterator[None]:
    """A block that reads an answer. Raises SampleError, with `what` and how the answer begins, where it raises one of
    MISREAD."""
    try:
        yield
    except MISREAD as error:
        raise SampleError(f"{what}: {readable(error)}; it starts {body[:_START]!r}") from error


def whole(value: Any, name: str) -> int:
    """A number that is written as a whole one. Raises ValueError: `3.0`, `"3"` and `true` are none."""
    if type(value) is not int:
        raise ValueError(f"{name} is {readable(repr(value))}, which is no whole number")
    return value


def true_or_false(value: Any, name: str) -> bool:
    """Raises ValueError: `0`, `"false"` and `null` are neither."""
    if type(value) is not bool:
        raise ValueError(f"{name} is {readable(repr(value))}, which is neither true nor false")
    return value


def text(value: Any, name: str) -> str:
    """Raises ValueError: it is none."""
    if type(value) is not str:
        raise ValueError(f"{name} is {readable(repr(value))}, which is no text")
    return value


def token_ids(values: Any) -> npt.NDArray[np.int32]:
    """A list of whole numbers, int32 [R]. Raises one of MISREAD: numpy alone would take `1.5`, `"3"` and `true`."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise ValueError(f"the token ids {readable(repr(values))} are no list of whole numbers")
    return np.array(values, np.int32)


def read_finish_reason(kind: Any, detail: str) -> FinishReason:
    """Raises SampleError unless the response came to an end of its own.

    Args:
        kind: what the engine calls the reason.
        detail: what it said besides.
    """
    if kind == "abort":
        raise SampleError(f"the engine aborted the request: {readable(detail)}")
    if kind not in ("stop", "length"):
        raise SampleError(f"the engine finished with {readable(repr(kind))}, which is not stop, length or abort")
    return "stop" if kind == "stop" else "length"


def _check_end(answer: Answer, stop_strings: Sequence[str]) -> None:
    """A response that stopped must hold what stopped it: without it the policy would never learn to stop.

    Raises:
        SampleError: the end token is not the last one, the stop string was not asked for, or there is neither.
    """
    end, last = answer.ended_by, int(answer.response_ids_R[-1])
    if answer.finish_reason != "stop" or (end == last if isinstance(end, int) else end in stop_strings):
        return
    if isinstance(end, int):
        raise SampleError(
            f"the response was ended by token {end}, but its last token is {last}: the end token was taken away"
        )
    if end is None:
        raise SampleError(f"the response stopped, but its last token {last} is no end token")
    raise SampleError(f"the engine ended the response with {readable(repr(end))}, which is no stop string of the run")


def parsed(body: bytes) -> tuple[Any, memoryview | None]:
    """The JSON of an answer without the text of its `routed_experts`, and that text, undecoded and uncopied.

    Routes are nearly all of a long answer, and a parser would make a string of them while nothing else can run. Base64
    needs no escapes, so its text ends at the next quotation mark; the name in quotation marks cannot be part of
    another string, where they would be escaped. What is left of them in the JSON is an empty text, by which a reader
    sees that they stood where they belong.

    Raises:
        ValueError: as `parsed_json`, or routes are there twice.
    """
    start = found.end() if (found := _ROUTES.search(body)) else -1
    end = body.find(b'"', start) if found else -1
    if end >= 0 and _ROUTES.search(body, end):
        raise ValueError("routed_experts is there twice")
    if end < 0:
        return parsed_json(body), None
    return parsed_json(body[:start] + body[end:]), memoryview(body)[start:end]


def parsed_json(body: bytes | str) -> Any:
    """Of an answer that holds no routes. Raises ValueError: it is not JSON, or is nested too deeply."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def decoded(payload: memoryview | None) -> bytes:
    """Base64 of `routed_experts`, decoded. Raises RouteError."""
    if payload is None:
        raise RouteError("routed_experts is missing or not text: the server did not record")
    try:
        return pybase64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RouteError(f"routed_experts is not base64: {error}") from error


def checked_sample(
    asked: Asked, answer: Answer, facts: ModelFacts, routes_of: Callable[[int], npt.NDArray[np.integer]]
) -> Sample:
    """Check an answer against what was asked for.

    Args:
        routes_of: reads the answer's routes, [rows, L, K] with every decoder layer in it, given how many rows there
            must be; raises RouteError. Called only where routes were asked for.

    Raises:
        SampleError: cut short by the engine, of stale weights, of another prompt, or stopped by a token that is not
            there.
        RouteError: log-probabilities or routes break their contract.
    """
    response_ids_R, prompt_ids = answer.response_ids_R, asked.sample.prompt_ids
    if stale := sorted({version for version in answer.weight_versions if version != str(asked.weight_version)}):
        versions = readable(", ".join(stale[:5]))
        raise SampleError(f"the answer comes from weights of version {versions}, not {asked.weight_version}")
    if answer.prompt_tokens != len(prompt_ids):
        raise SampleError(f"the engine saw {answer.prompt_tokens} prompt tokens of {len(prompt_ids)}")
    if response_ids_R.ndim != 1 or not len(response_ids_R):
        raise SampleError(f"the response has shape {list(response_ids_R.shape)}, not one row of sampled tokens")
    if response_ids_R.min() < 0 or response_ids_R.max() >= facts.vocab_size:
        raise SampleError(f"a response token is outside the vocabulary of {facts.vocab_size}")
    if len(response_ids_R) > asked.max_new_tokens:
        raise SampleError(f"the response has {len(response_ids_R)} tokens, more than the {asked.max_new_tokens} asked")
    if answer.finish_reason == "length" and len(response_ids_R) != asked.max_new_tokens:
        raise SampleError(
            f"the engine cut the response after {len(response_ids_R)} of {asked.max_new_tokens} tokens: "
            "its context or its cache is too small for the prompt and the response (of a server: "
            "strategy_config.context_length, max_total_tokens)"
        )
    _check_end(answer, asked.stop_strings)
    log_probs_R = _log_probs(answer.log_prob_entries, response_ids_R)
    routes = None
    if asked.record_routes:
        num_rows = len(prompt_ids) + len(response_ids_R) - 1 - asked.sample.first_row
        routes = _routes(routes_of(num_rows), num_rows, facts).after_unknown(asked.sample.first_row)
    trajectory = Trajectory.one_turn(
        asked.sample.sample_id,
        asked.sample.group_id,
        prompt_ids=prompt_ids,
        response_ids=response_ids_R,
        log_probs=log_probs_R,
        version=asked.weight_version,
        finish_reason=answer.finish_reason,
        routes=routes,
    )
    return Sample(trajectory, from_cache=answer.cached_tokens >= asked.sample.cached_rows)


def _log_probs(entries: Sequence[Sequence[Any]], response_ids_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Each entry must belong to the token at its place."""
    try:
        values = [entry[0] for entry in entries]
        if not set(map(type, values)) <= {float, int}:
            raise ValueError("some are no numbers")
        log_probs_R = np.array(values, np.float32)
        ids_R = token_ids([entry[1] for entry in entries])
    except (*MISREAD, IndexError) as error:
        raise RouteError(f"the log-probabilities cannot be read: {readable(error)}") from error
    check_log_probs(log_probs_R, len(response_ids_R))
    if (ids_R != response_ids_R).any():
        raise RouteError(
            f"log-probabilities belong to other tokens than the response: {ids_R[:8].tolist()} ... against "
            f"{response_ids_R[:8].tolist()} ..."
        )
    return np.minimum(log_probs_R, np.float32(0))


def _routes(ids_RLK: npt.NDArray[np.integer], num_rows: int, facts: ModelFacts) -> RoutedExperts:
    return compact_routes(
        ids_RLK,
        num_rows=num_rows,
        num_layers=facts.num_layers,
        moe_layers=facts.moe_layers,
        num_experts=facts.num_experts,
        top_k=facts.top_k,
    )
