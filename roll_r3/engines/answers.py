"""Checks of a server's answer to one sample, common to all engines. Pure functions.

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
from roll_r3.config.findings.readable import readable
from roll_r3.engines.kept_checks import read_kept
from roll_r3.engines.sample import Asked, Sample, SampleError
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.checks import check_log_probs, compact_routes

_ROUTES = re.compile(rb'(?<!\\)"routed_experts"\s*:\s*"')
_START = 200
"""Bytes of an answer shown by a message."""
MISREAD = (ValueError, KeyError, TypeError, OverflowError, AttributeError)
"""Errors from reading a malformed answer."""


@dataclass(frozen=True)
class Answer:
    """Answer of any engine, under one set of names."""

    finish_reason: FinishReason
    ended_by: int | str | None
    """End token or stop string of the response; None if the engine does not name one."""
    response_ids_R: npt.NDArray[np.int32]
    log_prob_entries: Sequence[Sequence[Any]]
    """(log-probability, token id, ...) of each sampled token; the rest of an entry is ignored."""
    weight_versions: Sequence[str]
    """Every version reported by the engine."""
    prompt_tokens: int
    """Number of prompt tokens seen by the engine."""
    cached_tokens: int
    """Number of these taken from its prefix cache for certain; 0 if it does not say."""
    kept: Any = None
    """Set of tokens that each token was sampled from, as parsed; None if the engine returned none."""


@contextmanager
def reading(what: str, body: bytes) -> Iterator[None]:
    """Turn errors of MISREAD into SampleError, with `what` and the first bytes of the answer."""
    try:
        yield
    except MISREAD as error:
        raise SampleError(f"{what}: {readable(error)}; it starts {body[:_START]!r}") from error


def integer(value: Any, name: str) -> int:
    """Return a JSON integer. Raises ValueError for anything else, such as `3.0`, `"3"` or `true`."""
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {readable(repr(value))}")
    return value


def boolean(value: Any, name: str) -> bool:
    """Return a JSON boolean. Raises ValueError for anything else, such as `0`, `"false"` or `null`."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {readable(repr(value))}")
    return value


def text(value: Any, name: str) -> str:
    """Return a JSON string. Raises ValueError for anything else."""
    if type(value) is not str:
        raise ValueError(f"{name} must be a string, got {readable(repr(value))}")
    return value


def token_ids(values: Any) -> npt.NDArray[np.int32]:
    """Return a JSON list of integers as int32 [R].

    Raises one of MISREAD for anything else: numpy alone would accept `1.5`, `"3"` and `true`.
    """
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise ValueError(f"token ids must be a list of integers, got {readable(repr(values))}")
    return np.array(values, np.int32)


def read_finish_reason(kind: Any, detail: str) -> FinishReason:
    """Return why the response ended. Raises SampleError unless it stopped or reached its length.

    Args:
        kind: the engine's name of the reason.
        detail: the engine's explanation.
    """
    if kind == "abort":
        raise SampleError(f"the engine aborted the request: {readable(detail)}")
    if kind not in ("stop", "length"):
        raise SampleError(f"the engine finished with {readable(repr(kind))}, which is not stop, length or abort")
    return "stop" if kind == "stop" else "length"


def _check_end(answer: Answer, stop_strings: Sequence[str]) -> None:
    """Check that a stopped response holds its end token: without it the policy would never learn to stop.

    Raises:
        SampleError: the end token is not the last one, the stop string was not requested, or there is neither.
    """
    end, last = answer.ended_by, int(answer.response_ids_R[-1])
    if answer.finish_reason != "stop" or (end == last if isinstance(end, int) else end in stop_strings):
        return
    if isinstance(end, int):
        raise SampleError(f"token {end} ended the response, but its last token is {last}: the end token was removed")
    if end is None:
        raise SampleError(f"the response stopped, but its last token {last} is not an end token")
    raise SampleError(f"the engine ended the response with {readable(repr(end))}, which is not a requested stop string")


def parsed(body: bytes) -> tuple[Any, memoryview | None]:
    """Parse an answer apart from the text of `routed_experts`; return the JSON, and this text undecoded and uncopied.

    Routes are nearly all of a long answer, and a parser would build a string of them while holding the GIL. Base64
    needs no escapes, so its text ends at the next quotation mark. The quoted name cannot be part of another string,
    where its quotation marks would be escaped. The JSON keeps an empty string in place of the routes, so a reader can
    check their position.

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
    """Parse an answer without routes. Raises ValueError: not JSON, or nested too deeply."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def decoded(payload: memoryview | None) -> bytes:
    """Decode the base64 text of `routed_experts`. Raises RouteError."""
    if payload is None:
        raise RouteError("routed_experts is missing or not text: the server did not record")
    try:
        return pybase64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RouteError(f"routed_experts is not base64: {error}") from error


def checked_sample(
    asked: Asked, answer: Answer, facts: ModelFacts, routes_of: Callable[[int], npt.NDArray[np.integer]]
) -> Sample:
    """Check an answer against its request, and return it as a sample.

    Args:
        routes_of: reads the answer's routes, [rows, L, K] with every decoder layer, given the expected number of rows;
            raises RouteError. Called only if routes were requested.

    Raises:
        SampleError: cut short by the engine, of stale weights, of another prompt, or stopped by an absent token.
        RouteError: log-probabilities, kept tokens or routes break their contract.
    """
    response_ids_R, prompt_ids = answer.response_ids_R, asked.sample.prompt_ids
    max_new_tokens = asked.sample.sampling.max_new_tokens
    if stale := sorted({version for version in answer.weight_versions if version != str(asked.weight_version)}):
        versions = readable(", ".join(stale[:5]))
        raise SampleError(f"the answer comes from weights of version {versions}, not {asked.weight_version}")
    if answer.prompt_tokens != len(prompt_ids):
        raise SampleError(f"the engine saw {answer.prompt_tokens} prompt tokens of {len(prompt_ids)}")
    if response_ids_R.ndim != 1 or not len(response_ids_R):
        raise SampleError(f"the response has shape {list(response_ids_R.shape)}, not one row of sampled tokens")
    if response_ids_R.min() < 0 or response_ids_R.max() >= facts.vocab_size:
        raise SampleError(f"a response token is outside the vocabulary of {facts.vocab_size}")
    if len(response_ids_R) > max_new_tokens:
        raise SampleError(f"the response has {len(response_ids_R)} tokens, more than the requested {max_new_tokens}")
    if answer.finish_reason == "length" and len(response_ids_R) != max_new_tokens:
        raise SampleError(
            f"the engine cut the response after {len(response_ids_R)} of {max_new_tokens} tokens: "
            "its context or its cache is too small for the prompt and the response (of a server: "
            "strategy_config.context_length, max_total_tokens)"
        )
    _check_end(answer, asked.sample.sampling.stop_strings)
    log_probs_R = _log_probs(answer.log_prob_entries, response_ids_R)
    kept = None
    if asked.sample.sampling.return_kept:
        kept = read_kept(answer.kept, response_ids_R, facts.vocab_size)
    routes = None
    if asked.sample.record_routes:
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
        kept=kept,
    )
    return Sample(trajectory, from_cache=answer.cached_tokens >= asked.sample.cached_rows)


def _log_probs(entries: Sequence[Sequence[Any]], response_ids_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return the log-probabilities [R], each checked against the token at its place."""
    try:
        values = [entry[0] for entry in entries]
        if not set(map(type, values)) <= {float, int}:
            raise ValueError("some are not numbers")
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
