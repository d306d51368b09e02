"""A vLLM server's answer to one sample. Pure functions; they run in a thread beside the event loop.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.config.readable import readable
from roll_r3.engines.answers import (
    Answer,
    Asked,
    checked_sample,
    decoded,
    parsed,
    parsed_json,
    read_finish_reason,
    reading,
    text,
    token_ids,
    whole,
)
from roll_r3.engines.sampling import Sample
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts

_MAGIC = b"\x93NUMPY\x01\x00"
_LONGEST_HEADER = 1024
"""Bytes; numpy writes 128 for an array of three axes."""
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9])', 'fortran_order': False, 'shape': \(([0-9]{1,12}), ([0-9]{1,12}), ([0-9]{1,12})\),"
    rb" \} *\n"
)
_EXACT = 1 << 53
"""Whole numbers below it are exact as floats."""
_DTYPES = {b"|u1": np.uint8, b"<u2": np.uint16, b"<i4": np.int32}
"""What vLLM records in: the smallest that holds the number of experts."""
_CACHE_SETTINGS = re.compile(rb"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_PREEMPTIONS = re.compile(rb"^vllm:num_preemptions_total(?:\{.*\})? ([^ \n]+)$", re.MULTILINE)
_SETTING = re.compile(rb'\b(\w+)="([^"]*)"')
_NUMBER = re.compile(rb"[0-9]{1,9}")
_COUNT = re.compile(rb"[0-9]{1,16}(\.[0-9]{1,17})?(e\+[0-9]{1,2})?")


def read_sample(body: bytes, asked: Asked, facts: ModelFacts, end_tokens: Collection[int]) -> Sample:
    """Read the answer to one `/inference/v1/generate` request.

    Args:
        body: the JSON answer, as it came.
        asked: what it must be an answer to.
        facts: the model's layers, experts and vocabulary.
        end_tokens: the ids that may end a response; the answer does not name the one that did.

    Raises:
        SampleError: aborted, cut short by the engine, of stale weights, stopped without an end token, or not in the
            form that vLLM documents.
        RouteError: log-probabilities or routes break their contract.
    """
    with reading("the answer cannot be read", body):
        said, payload = parsed(body)
        (choice,) = said["choices"]
        ids_R = token_ids(choice["token_ids"])
        last = int(ids_R[-1]) if len(ids_R) else None
        answer = Answer(
            finish_reason=read_finish_reason(choice["finish_reason"], "a weight update, or the server is going down"),
            ended_by=last if last in end_tokens else None,
            response_ids_R=ids_R,
            log_prob_entries=[(entry["logprob"], entry["token_id"]) for entry in choice["logprobs"]["content"]],
            weight_versions=_weight_versions(choice),
            prompt_tokens=whole(said["usage"]["prompt_tokens"], "prompt_tokens"),
            cached_tokens=_cached_tokens(said["usage"]),
        )
        if payload is not None and choice["routed_experts"] != "":
            raise ValueError("routed_experts is not in the choice")
    return checked_sample(asked, answer, facts, lambda num_rows: read_npy(payload, num_rows, facts))


def read_weight_version(body: bytes) -> str:
    """Of the weights that the engine has, as `/weight_info` says. Raises SampleError."""
    with reading("/weight_info does not say which weights the engine has", body):
        return text(parsed_json(body)["weight_version"], "weight_version")


def read_preemptions(body: bytes) -> int:
    """Of all ranks, as `/metrics` counts them. Raises SampleError."""
    with reading("/metrics does not count preemptions (vllm:num_preemptions_total)", body):
        counts = _PREEMPTIONS.findall(body)
        if not counts:
            raise ValueError("it has no such line")
        return sum(map(_count, counts))


def _count(written: bytes) -> int:
    """A counter of Prometheus, which writes all numbers as floats. Raises ValueError."""
    value = float(written) if _COUNT.fullmatch(written) else -1.0
    if not (0 <= value < _EXACT and value.is_integer()):
        raise ValueError(f"{readable(written)} is no number of preemptions")
    return int(value)


def read_cache_page(body: bytes) -> int:
    """Tokens of a page of the prefix cache, as `/metrics` says; 0: there is no such cache. Raises SampleError."""
    with reading("/metrics does not say what the engine's cache keeps (vllm:cache_config_info)", body):
        found = _CACHE_SETTINGS.search(body)
        settings = dict(_SETTING.findall(found[1])) if found else {}
        page, kept = settings[b"block_size"], settings[b"enable_prefix_caching"]
        if not _NUMBER.fullmatch(page) or not int(page):
            raise ValueError(f"block_size is {readable(page)}")
        if kept not in (b"True", b"False"):
            raise ValueError(f"enable_prefix_caching is {readable(kept)}")
        return int(page) if kept == b"True" else 0


def _cached_tokens(usage: dict[str, Any]) -> int:
    """As when the prompt was first computed, which is when its rows were read; a preemption changes none of them."""
    details = usage.get("prompt_tokens_details")
    return whole(details["cached_tokens"], "cached_tokens") if details else 0


def _weight_versions(choice: dict[str, Any]) -> list[str]:
    """Of every response token, none left out."""
    spans = choice["weight_versions"]
    ends = [0, *(whole(span["end"], "end") for span in spans)]
    starts = [whole(span["start"], "start") for span in spans]
    if starts != ends[:-1] or ends != sorted(ends) or ends[-1] != len(choice["token_ids"]):
        raise ValueError(f"weight_versions {spans} do not cover the response")
    return [str(span["version"]) for span in spans]


def read_npy(payload: memoryview | None, num_rows: int, facts: ModelFacts) -> npt.NDArray[np.integer]:
    """The array in base64 of a `.npy` file; what its header claims is compared, never allocated.

    Args:
        payload: base64 text, as it came; None when none did.
        num_rows: the rows that must be there.
        facts: L and K.

    Returns:
        Expert ids [num_rows, L, K], uint8, uint16 or int32: a view of the decoded bytes.

    Raises:
        RouteError: not such a file, of another type or shape, or longer or shorter than it says.
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
            f"top-{facts.top_k} were expected (rows = tokens - 1, less those that were not asked for)"
        )
    if len(content) - end != int(np.prod(shape)) * dtype.itemsize:
        raise RouteError(f"routed_experts says {list(shape)} of {dtype}, but {len(content) - end} bytes follow")
    return np.frombuffer(content, dtype, offset=end).reshape(shape)
