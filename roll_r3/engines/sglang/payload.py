"""An SGLang server's answer to one sample. Pure functions; they run in a thread beside the event loop.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.engines.answers import (
    Answer,
    Asked,
    checked_sample,
    decoded,
    parsed,
    parsed_json,
    read_finish_reason,
    reading,
    token_ids,
    true_or_false,
    whole,
)
from roll_r3.engines.sampling import Sample
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts

_ID = np.dtype("<i4")


def read_sample(body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
    """Read the answer to one `/generate` request.

    Args:
        body: the JSON answer, as it came.
        asked: what it must be an answer to.
        facts: the model's layers, experts and vocabulary.

    Raises:
        SampleError: aborted, cut short by the engine, of stale weights, stopped by a token that is not there, or not in
            the form that SGLang documents.
        RouteError: log-probabilities or routes break their contract.
    """
    with reading("the answer cannot be read", body):
        said, payload = parsed(body)
        meta = said["meta_info"]
        reason = meta["finish_reason"]
        answer = Answer(
            finish_reason=read_finish_reason(reason["type"], reason.get("message", "no reason given")),
            ended_by=_ended_by(reason.get("matched")),
            response_ids_R=token_ids(said["output_ids"]),
            log_prob_entries=meta["output_token_logprobs"],
            weight_versions=_weight_versions(meta),
            prompt_tokens=whole(meta["prompt_tokens"], "prompt_tokens"),
            cached_tokens=_cached_tokens(meta),
        )
        if payload is not None and meta["routed_experts"] != "":
            raise ValueError("routed_experts is not in meta_info")
    return checked_sample(asked, answer, facts, lambda num_rows: _routes(payload, facts))


def read_cache_page(body: bytes) -> int:
    """Tokens of a page of the prefix cache, as `/server_info` says; 0: there is no such cache. Raises SampleError."""
    with reading("/server_info does not say what the engine's cache keeps", body):
        said = parsed_json(body)
        off, page = true_or_false(said["disable_radix_cache"], "disable_radix_cache"), said["page_size"]
        if not off and whole(page, "page_size") < 1:
            raise ValueError(f"page_size is {page}")
    return 0 if off else page


def _ended_by(matched: Any) -> int | str | None:
    """Token id or stop string. For logits of NaN it is a text that nobody asked for. Raises ValueError."""
    return matched if matched is None or type(matched) is str else whole(matched, "matched")


def _weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """What the server was at when it answered, and what each token came from where the release says so."""
    return [str(meta["weight_version"]), *(str(span["version"]) for span in meta.get("weight_versions") or ())]


def _cached_tokens(meta: Mapping[str, Any]) -> int:
    """As when the prompt was first computed. A request that was retracted may have computed it again since then."""
    retractions = meta.get("num_retractions")
    never = retractions is not None and whole(retractions, "num_retractions") == 0
    return whole(meta["cached_tokens"], "cached_tokens") if never else 0


def _routes(payload: memoryview | None, facts: ModelFacts) -> npt.NDArray[np.integer]:
    """Base64 of little-endian C-order int32 [rows, L, K]."""
    content = decoded(payload)
    if len(content) % _ID.itemsize:
        raise RouteError(f"routed_experts holds {len(content)} bytes, not int32")
    flat = np.frombuffer(content, _ID)
    row = facts.num_layers * facts.top_k
    if len(flat) % row:
        raise RouteError(
            f"routed_experts holds {len(flat)} ids, not whole rows of {facts.num_layers} layers x top-{facts.top_k}"
        )
    return flat.reshape(-1, facts.num_layers, facts.top_k)
