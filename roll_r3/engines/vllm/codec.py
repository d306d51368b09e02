"""vLLM's form of a request for one sample, and of the answer. Answers are read in a thread.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.config.findings.readable import readable
from roll_r3.config.sampling_settings import KEPT_LIMIT, Sampling
from roll_r3.engines.answers import (
    Answer,
    checked_sample,
    decoded,
    integer,
    parsed,
    parsed_json,
    read_finish_reason,
    reading,
    text,
    token_ids,
)
from roll_r3.engines.sample import Asked, Sample
from roll_r3.errors import RouteError
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.models.facts import ModelFacts

_MAGIC = b"\x93NUMPY\x01\x00"
_LONGEST_HEADER = 1024
"""Bytes of an accepted header; numpy writes 128 for an array of three axes."""
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9])', 'fortran_order': False, 'shape': \(([0-9]{1,12}), ([0-9]{1,12}), ([0-9]{1,12})\),"
    rb" \} *\n"
)
_EXACT = 1 << 53
"""Limit below which integers are exact as floats."""
_DTYPES = {b"|u1": np.uint8, b"<u2": np.uint16, b"<i4": np.int32}
"""Types of recorded ids: vLLM takes the smallest for the number of experts."""
_CACHE_SETTINGS = re.compile(rb"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_PREEMPTIONS = re.compile(rb"^vllm:num_preemptions_total(?:\{.*\})? ([^ \n]+)$", re.MULTILINE)
_SETTING = re.compile(rb'\b(\w+)="([^"]*)"')
_NUMBER = re.compile(rb"[0-9]{1,9}")
_COUNT = re.compile(rb"[0-9]{1,16}(\.[0-9]{1,17})?(e\+[0-9]{1,2})?")


class VllmCodec:
    """Requests to `/inference/v1/generate`. Implements `roll_r3.engines.parts.Codec`.

    Log-probabilities are right under the sampling settings of the server's launch (`logprobs_mode`).
    """

    path = "/inference/v1/generate"

    def __init__(self, checkpoint: str, *, trust_remote_code: bool, returns_kept: bool = False) -> None:
        """
        Args:
            returns_kept: the server returns the kept tokens of every request.
        """
        self._returns_kept = returns_kept
        self._checkpoint = checkpoint
        self._trust_remote_code = trust_remote_code
        self.end_tokens: frozenset[int] = frozenset()
        """End tokens of the checkpoint: an answer does not name its own."""

    def load(self) -> None:
        """Read the checkpoint's end tokens."""
        from roll_r3.models.hf.tokenizer import read_end_tokens, read_tokenizer  # seconds to import

        checkpoint = resolve_checkpoint(self._checkpoint)
        tokenizer = read_tokenizer(checkpoint, trust_remote_code=self._trust_remote_code)
        self.end_tokens = read_end_tokens(checkpoint, tokenizer)

    def request(self, asked: Asked) -> dict[str, Any]:
        sample, sampling = asked.sample, asked.sample.sampling
        params: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            **self._distribution(sampling),
            "seed": sample.seed,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
            "routed_experts_prompt_start": sample.first_row if sample.record_routes else len(sample.prompt_ids),
        }
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        request: dict[str, Any] = {"token_ids": list(sample.prompt_ids), "sampling_params": params}
        if sample.cache_key:
            request["cache_salt"] = sample.cache_key
        return request

    def kept_limit(self, asked: Asked) -> int:
        """As `Codec.kept_limit`: the server returns the sets of all requests, of evaluations too."""
        return self._bounded(asked.sample.sampling).top_k if self._returns_kept else 0

    def _distribution(self, sampling: Sampling) -> dict[str, float]:
        """Return temperature, top_p and top_k."""
        if self._returns_kept:
            sampling = self._bounded(sampling)
        temperature = 0.0 if sampling.greedy else sampling.temperature
        return {"temperature": temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}

    def _bounded(self, sampling: Sampling) -> Sampling:
        """Return settings accepted by a server that returns kept tokens: it refuses greedy or unbounded requests.

        They become requests for the likeliest token, and for one of the `KEPT_LIMIT` likeliest.
        """
        if sampling.greedy:
            return replace(sampling, greedy=False, temperature=1.0, top_k=1)
        return replace(sampling, top_k=KEPT_LIMIT) if sampling.top_k < 1 else sampling

    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        """Read and check an answer.

        Raises:
            SampleError: aborted, cut short by the engine, of stale weights, stopped without an end token, or not in
                the form documented by vLLM.
            RouteError: log-probabilities or routes break their contract.
        """
        with reading("the answer cannot be read", body):
            said, payload = parsed(body)
            (choice,) = said["choices"]
            ids_R = token_ids(choice["token_ids"])
            last = int(ids_R[-1]) if len(ids_R) else None
            ends = last in self.end_tokens or last in asked.sample.sampling.stop_token_ids
            detail = "a weight update, or the server is going down"
            answer = Answer(
                finish_reason=read_finish_reason(choice["finish_reason"], detail),
                ended_by=last if ends else None,
                response_ids_R=ids_R,
                log_prob_entries=[(entry["logprob"], entry["token_id"]) for entry in choice["logprobs"]["content"]],
                weight_versions=_weight_versions(choice),
                prompt_tokens=integer(said["usage"]["prompt_tokens"], "prompt_tokens"),
                cached_tokens=_cached_tokens(said["usage"]),
                kept=choice["sampling_mask"] if asked.sample.sampling.return_kept else None,
            )
            if payload is not None and choice["routed_experts"] != "":
                raise ValueError("routed_experts is not in the choice")
        return checked_sample(asked, answer, facts, lambda num_rows: read_npy(payload, num_rows, facts))


def read_weight_version(body: bytes) -> str:
    """Return the version of the engine's weights, from `/weight_info`. Raises SampleError."""
    with reading("/weight_info does not give the version of the weights", body):
        return text(parsed_json(body)["weight_version"], "weight_version")


def read_preemptions(body: bytes) -> int:
    """Return the number of preemptions of all ranks, from `/metrics`. Raises SampleError."""
    with reading("/metrics does not count preemptions (vllm:num_preemptions_total)", body):
        counts = _PREEMPTIONS.findall(body)
        if not counts:
            raise ValueError("there is no such line")
        return sum(map(_count, counts))


def _count(written: bytes) -> int:
    """Read a counter of Prometheus, a count written as a float. Raises ValueError."""
    value = float(written) if _COUNT.fullmatch(written) else -1.0
    if not (0 <= value < _EXACT and value.is_integer()):
        raise ValueError(f"the number of preemptions must be a count, got {readable(written)}")
    return int(value)


def read_cache_page(body: bytes) -> int:
    """Return the tokens per page of the prefix cache, from `/metrics`; 0: no cache. Raises SampleError."""
    with reading("/metrics does not describe the engine's cache (vllm:cache_config_info)", body):
        found = _CACHE_SETTINGS.search(body)
        settings = dict(_SETTING.findall(found[1])) if found else {}
        page, kept = settings[b"block_size"], settings[b"enable_prefix_caching"]
        if not _NUMBER.fullmatch(page) or not int(page):
            raise ValueError(f"block_size must be a positive integer, got {readable(page)}")
        if kept not in (b"True", b"False"):
            raise ValueError(f"enable_prefix_caching must be True or False, got {readable(kept)}")
        return int(page) if kept == b"True" else 0


def _cached_tokens(usage: dict[str, Any]) -> int:
    """Return the count at the first computation of the prompt. Its rows were read then; a preemption changes none."""
    details = usage.get("prompt_tokens_details")
    return integer(details["cached_tokens"], "cached_tokens") if details else 0


def _weight_versions(choice: dict[str, Any]) -> list[str]:
    """Return the versions of all response tokens. Raises ValueError if a token is left out."""
    spans = choice["weight_versions"]
    ends = [0, *(integer(span["end"], "end") for span in spans)]
    starts = [integer(span["start"], "start") for span in spans]
    if starts != ends[:-1] or ends != sorted(ends) or ends[-1] != len(choice["token_ids"]):
        raise ValueError(f"weight_versions {spans} do not cover the response")
    return [str(span["version"]) for span in spans]


def read_npy(payload: memoryview | None, num_rows: int, facts: ModelFacts) -> npt.NDArray[np.integer]:
    """Read the array from base64 of a `.npy` file. The shape in its header is compared, never allocated.

    Args:
        payload: base64 text as received; None if there was none.
        num_rows: expected number of rows.
        facts: L and K.

    Returns:
        Expert ids [num_rows, L, K], uint8, uint16 or int32: a view of the decoded bytes.

    Raises:
        RouteError: not such a file, of another type or shape, or of another length than its header gives.
    """
    shape = (num_rows, facts.num_layers, facts.top_k)
    most = int(np.prod(shape)) * np.dtype(np.int32).itemsize + _LONGEST_HEADER
    if payload is not None and len(payload) > 4 * (most // 3 + 1):
        raise RouteError(f"routed_experts is base64 of {len(payload)} characters, too many for {list(shape)}")
    content = decoded(payload)
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
    header = _HEADER.fullmatch(content[start:end])
    if not content.startswith(_MAGIC) or header is None or header[1] not in _DTYPES:
        raise RouteError(f"routed_experts is not an array of expert ids: it starts {content[:end][:160]!r}")
    found, dtype = tuple(int(size) for size in header.groups()[1:]), np.dtype(_DTYPES[header[1]])
    if found != shape:
        raise RouteError(
            f"routed_experts has shape {list(found)}, but {num_rows} rows x {facts.num_layers} layers x "
            f"top-{facts.top_k} were expected (rows = tokens - 1, less those not requested)"
        )
    if len(content) - end != int(np.prod(shape)) * dtype.itemsize:
        raise RouteError(f"routed_experts says {list(shape)} of {dtype}, but {len(content) - end} bytes follow")
    return np.frombuffer(content, dtype, offset=end).reshape(shape)
