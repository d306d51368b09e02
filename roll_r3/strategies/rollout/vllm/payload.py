"""A vLLM server's answer to one sample. Pure functions; they run in a thread beside the event loop.

Shape legend: R response tokens; L all decoder layers, K experts per token.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.rollout.answers import (
    MISREAD,
    Answer,
    Asked,
    checked_sample,
    decoded,
    parsed,
    read_finish_reason,
    readable,
    token_ids,
    whole,
)
from roll_r3.strategies.rollout.sampling import Sample, SampleError

_MAGIC = b"\x93NUMPY\x01\x00"
_LONGEST_HEADER = 1024
"""Bytes; numpy writes 128 for an array of three axes."""
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9])', 'fortran_order': False, 'shape': \(([0-9]{1,12}), ([0-9]{1,12}), ([0-9]{1,12})\),"
    rb" \} *\n"
)
_DTYPES = {b"|u1": np.uint8, b"<u2": np.uint16, b"<i4": np.int32}
"""What vLLM records in: the smallest that holds the number of experts."""


def read_sample(body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
    """Read the answer to one `/inference/v1/generate` request.

    Args:
        body: the JSON answer, as it came.
        asked: what it must be an answer to.
        facts: the model's layers, experts and vocabulary.

    Raises:
        SampleError: aborted, cut short by the engine, of stale weights, or not in the form that vLLM documents.
        RouteError: log-probabilities or routes break their contract.
    """
    try:
        said, payload = parsed(body)
        (choice,) = said["choices"]
        answer = Answer(
            finish_reason=read_finish_reason(choice["finish_reason"], "a weight update, or the server is going down"),
            response_ids_R=token_ids(choice["token_ids"]),
            log_prob_entries=[(entry["logprob"], entry["token_id"]) for entry in choice["logprobs"]["content"]],
            weight_versions=_weight_versions(choice),
            prompt_tokens=whole(said["usage"]["prompt_tokens"], "prompt_tokens"),
            cached_tokens=_cached_tokens(said["usage"]),
        )
        if payload is not None and choice["routed_experts"] != "":
            raise ValueError("routed_experts is not in the choice")
    except MISREAD as error:
        raise SampleError(f"the answer cannot be read: {readable(error)}; it starts {body[:200]!r}") from error
    return checked_sample(asked, answer, facts, lambda num_rows: read_npy(payload, num_rows, facts))


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
