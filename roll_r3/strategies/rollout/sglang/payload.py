"""An SGLang server's answer to one sample. Pure functions; they run in a thread beside the event loop.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.batch.trajectory import Trajectory
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.rollout.answers import Answer, Asked, checked_trajectory, read_finish_reason
from roll_r3.strategies.rollout.sampling import SampleError


def read_sample(body: bytes, asked: Asked, facts: ModelFacts) -> Trajectory:
    """Read the answer to one `/generate` request.

    Args:
        body: the JSON answer, as it came.
        asked: what it must be an answer to.
        facts: the model's layers, experts and vocabulary.

    Raises:
        SampleError: aborted, cut short by the engine, of stale weights, or not in the form that SGLang documents.
        RouteError: log-probabilities or routes break their contract.
    """
    try:
        said = json.loads(body)
        meta = said["meta_info"]
        reason = meta["finish_reason"]
        answer = Answer(
            finish_reason=read_finish_reason(reason["type"], reason.get("message", "no reason given")),
            response_ids_R=np.array(said["output_ids"], np.int32),
            log_prob_entries=meta["output_token_logprobs"],
            weight_versions=_weight_versions(meta),
            prompt_tokens=meta["prompt_tokens"],
        )
        payload = meta.get("routed_experts")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise SampleError(
            f"the answer cannot be read: {type(error).__name__}: {error}; it starts {body[:200]!r}"
        ) from error
    return checked_trajectory(asked, answer, facts, lambda num_rows: _routes(payload, facts))


def _weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """What the server was at when it answered, and what each token came from where the release says so."""
    return [str(meta["weight_version"]), *(str(span["version"]) for span in meta.get("weight_versions") or ())]


def _routes(payload: Any, facts: ModelFacts) -> npt.NDArray[np.integer]:
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
    return flat.reshape(-1, facts.num_layers, facts.top_k)
