"""A server's answer to one sample, read and checked. Pure functions; they run in a thread beside the event loop.

Shape legend: P prompt tokens, R response tokens, T = P + R; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import FinishReason, Trajectory
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.checks import check_log_probs, compact_routes
from roll_r3.strategies.rollout.sampling import SampleError


def read_sample(
    body: bytes,
    *,
    sample_id: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    weight_version: int,
    facts: ModelFacts,
    record_routes: bool,
) -> Trajectory:
    """Read the answer to one `/generate` request.

    Args:
        body: the JSON answer, as it came.
        max_new_tokens: what was asked for; an answer cut earlier than that is refused.
        weight_version: of the weights that must have produced every token.
        facts: the model's layers, experts and vocabulary.
        record_routes: whether routes were asked for and must be there.

    Raises:
        SampleError: aborted, cut short by the engine, of stale weights, or not in the form that SGLang documents.
        RouteError: log-probabilities or routes break their contract.
    """
    try:
        answer = json.loads(body)
        meta = answer["meta_info"]
        finish_reason = _finish_reason(meta["finish_reason"])
        response_ids_R = np.array(answer["output_ids"], np.int32)
        log_prob_entries = meta["output_token_logprobs"]
        versions = _weight_versions(meta)
        prompt_tokens = meta["prompt_tokens"]
        payload = meta.get("routed_experts")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise SampleError(
            f"the answer cannot be read: {type(error).__name__}: {error}; it starts {body[:200]!r}"
        ) from error

    if stale := sorted({version for version in versions if version != str(weight_version)}):
        raise SampleError(f"the answer comes from weights of version {', '.join(stale)}, not {weight_version}")
    if prompt_tokens != len(prompt_ids):
        raise SampleError(f"the engine saw {prompt_tokens} prompt tokens of {len(prompt_ids)}")
    if response_ids_R.ndim != 1 or not len(response_ids_R):
        raise SampleError(f"the response has shape {list(response_ids_R.shape)}, not one row of sampled tokens")
    if response_ids_R.min() < 0 or response_ids_R.max() >= facts.vocab_size:
        raise SampleError(f"a response token is outside the vocabulary of {facts.vocab_size}")
    if finish_reason == "length" and len(response_ids_R) != max_new_tokens:
        raise SampleError(
            f"the engine cut the response after {len(response_ids_R)} of {max_new_tokens} tokens: "
            "strategy_config.context_length or max_total_tokens is too small for the prompt and the response"
        )
    log_probs_R = _log_probs(log_prob_entries, response_ids_R)
    routes = None
    if record_routes:
        routes = _routes(payload, num_rows=len(prompt_ids) + len(response_ids_R) - 1, facts=facts)
    return Trajectory(
        sample_id=sample_id,
        prompt_ids_P=np.array(prompt_ids, np.int32),
        response_ids_R=response_ids_R,
        log_probs_R=log_probs_R,
        finish_reason=finish_reason,
        weight_versions=(weight_version,),
        routes=routes,
    )


def _finish_reason(reason: Mapping[str, Any]) -> FinishReason:
    kind = reason["type"]
    if kind == "abort":
        raise SampleError(f"the engine aborted the request: {reason.get('message', 'no reason given')}")
    if kind not in ("stop", "length"):
        raise SampleError(f"the engine finished with {kind!r}, which is not stop, length or abort")
    return "stop" if kind == "stop" else "length"


def _weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """What the server was at when it answered, and what each token came from where the release says so."""
    return [str(meta["weight_version"]), *(str(span["version"]) for span in meta.get("weight_versions") or ())]


def _log_probs(entries: Sequence[Sequence[Any]], response_ids_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Entries are (log-probability, token id, text or None); each must belong to the token at its place."""
    try:
        log_probs_R = np.array([entry[0] for entry in entries], np.float32)
        ids_R = np.array([entry[1] for entry in entries], np.int64)
    except (TypeError, ValueError, IndexError) as error:
        raise RouteError(f"output_token_logprobs cannot be read: {error}") from error
    check_log_probs(log_probs_R, len(response_ids_R))
    if (ids_R != response_ids_R).any():
        raise RouteError(
            f"log-probabilities belong to other tokens than the response: {ids_R[:8].tolist()} ... against "
            f"{response_ids_R[:8].tolist()} ..."
        )
    return np.minimum(log_probs_R, np.float32(0))


def _routes(payload: Any, *, num_rows: int, facts: ModelFacts) -> RoutedExperts:
    """Base64 of little-endian C-order int32 [rows, L, K]."""
    if not isinstance(payload, str):
        raise RouteError(f"routed_experts is {type(payload).__name__}, not base64 text: the server did not record")
    try:
        flat = np.frombuffer(base64.b64decode(payload, validate=True), np.dtype("<i4"))
    except (binascii.Error, ValueError) as error:
        raise RouteError(f"routed_experts is not base64 of int32: {error}") from error
    row = facts.num_layers * facts.top_k
    if len(flat) % row:
        raise RouteError(
            f"routed_experts holds {len(flat)} ids, not whole rows of {facts.num_layers} layers x top-{facts.top_k}"
        )
    return compact_routes(
        flat.reshape(-1, facts.num_layers, facts.top_k),
        num_rows=num_rows,
        num_layers=facts.num_layers,
        moe_layers=facts.moe_layers,
        num_experts=facts.num_experts,
        top_k=facts.top_k,
    )
