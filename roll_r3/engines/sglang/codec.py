"""SGLang's form of a request for one sample, and of the answer. Answers are read in a thread.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.engines.answers import (
    Answer,
    boolean,
    checked_sample,
    decoded,
    integer,
    parsed,
    parsed_json,
    read_finish_reason,
    reading,
    token_ids,
)
from roll_r3.engines.sample import Asked, Sample
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts

_ID = np.dtype("<i4")


class SglangCodec:
    """Requests to `/generate`. Implements `roll_r3.engines.parts.Codec`."""

    path = "/generate"
    returns_kept = True
    """False for a release that is not asked for kept tokens: log-probabilities are of the whole distribution."""

    def load(self) -> None:
        """Do nothing: answers name their end token."""

    def request(self, asked: Asked) -> dict[str, Any]:
        sample, sampling = asked.sample, asked.sample.sampling
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "sampling_seed": sample.seed,
            "skip_special_tokens": False,
        }
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        if sampling.stop_strings:
            params["stop"] = list(sampling.stop_strings)
        request = {"input_ids": list(sample.prompt_ids), "sampling_params": params, "return_logprob": True}
        if self.kept_limit(asked):
            request["return_sampling_mask"] = True
        if sample.record_routes:
            request |= {"return_routed_experts": True, "routed_experts_start_len": sample.first_row}
        if sample.cache_key:
            request["extra_key"] = sample.cache_key
        if asked.request_id:
            request["rid"] = asked.request_id
        return request

    def kept_limit(self, asked: Asked) -> int:
        sampling = asked.sample.sampling
        return sampling.top_k if self.returns_kept and sampling.return_kept else 0

    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        """Read and check an answer.

        Raises:
            SampleError: aborted, cut short by the engine, of stale weights, stopped by an absent token, or not in the
                form documented by SGLang.
            RouteError: log-probabilities or routes break their contract.
        """
        kept = self.kept_limit(asked) > 0
        if not kept:
            sampling = replace(asked.sample.sampling, return_kept=False)
            asked = replace(asked, sample=replace(asked.sample, sampling=sampling))
        with reading("the answer cannot be read", body):
            said, payload = parsed(body)
            meta = said["meta_info"]
            reason = meta["finish_reason"]
            answer = Answer(
                finish_reason=read_finish_reason(reason["type"], reason.get("message", "no reason given")),
                ended_by=_ended_by(reason.get("matched")),
                response_ids_R=token_ids(said["output_ids"]),
                log_prob_entries=_kept_log_probs(meta) if kept else meta["output_token_logprobs"],
                weight_versions=_weight_versions(meta),
                prompt_tokens=integer(meta["prompt_tokens"], "prompt_tokens"),
                cached_tokens=_cached_tokens(meta),
                kept=meta["output_token_sampling_mask"] if kept else None,
            )
            if payload is not None and meta["routed_experts"] != "":
                raise ValueError("routed_experts is not in meta_info")
        return checked_sample(asked, answer, facts, lambda num_rows: _routes(payload, facts))


def read_cache_page(body: bytes) -> int:
    """Return the tokens per page of the prefix cache, from `/server_info`; 0: no cache. Raises SampleError."""
    with reading("/server_info does not describe the engine's cache", body):
        said = parsed_json(body)
        off, page = boolean(said["disable_radix_cache"], "disable_radix_cache"), said["page_size"]
        if not off and integer(page, "page_size") < 1:
            raise ValueError(f"page_size must be positive, got {page}")
    return 0 if off else page


def _kept_log_probs(meta: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return entries of the log-probabilities over the kept tokens, with the ids of those over the vocabulary.

    Raises ValueError if their numbers differ.
    """
    whole, values = meta["output_token_logprobs"], meta["output_token_sampling_logprobs"]
    return [(value, entry[1]) for value, entry in zip(values, whole, strict=True)]


def _ended_by(matched: Any) -> int | str | None:
    """Return the end token or stop string; for logits of NaN, an unrequested string. Raises ValueError."""
    return matched if matched is None or type(matched) is str else integer(matched, "matched")


def _weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """Return the server's version at the answer, and the version of each token if the release reports it."""
    return [str(meta["weight_version"]), *(str(span["version"]) for span in meta.get("weight_versions") or ())]


def _cached_tokens(meta: Mapping[str, Any]) -> int:
    """Return the count at the first computation of the prompt; 0 if a retraction may have led to another one."""
    retractions = meta.get("num_retractions")
    never = retractions is not None and integer(retractions, "num_retractions") == 0
    return integer(meta["cached_tokens"], "cached_tokens") if never else 0


def _routes(payload: memoryview | None, facts: ModelFacts) -> npt.NDArray[np.integer]:
    """Read base64 of little-endian C-order int32 [rows, L, K]. Raises RouteError."""
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
