"""One sample on its way: the request for it, and the checked answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import Sampling
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.base import GenerateRequest

_ID_BYTES = 4
"""Bytes of an expert id, in the largest type of any engine."""
_TOKEN_BYTES = 4096
"""Bytes allowed for one response token: id, log-probability with all its details, text."""
_KEPT_BYTES = 9
"""Bytes of the text of a kept token's id."""
_TIES = 2
"""Factor on top_k for tokens as likely as the last kept one, which some kernels keep too."""
_HEAD_BYTES = 1 << 20
"""Bytes allowed for the rest of an answer."""


class SampleError(Exception):
    """One sample did not come back usable; a retry may help. The message gives the reason."""


@dataclass(frozen=True)
class SampleRequest:
    """Request for one sample of a group."""

    prompt_ids: tuple[int, ...]
    sample_id: str
    seed: int
    sampling: Sampling
    group_id: str = ""
    """Group of the sample; empty in a warm-up."""
    record_routes: bool = True
    """True if the answer must hold routes, from `first_row` on."""
    first_row: int = 0
    """First row of routes in the answer."""
    cached_rows: int = 0
    """Number of prompt tokens required in the engine's prefix cache."""
    cache_key: str = ""
    """Key of the prefix cache: requests share prefixes only under the same key."""


def samples_of(request: GenerateRequest) -> list[SampleRequest]:
    """Return a request for each sample of a group."""
    if len(request.seeds) != len(request.sample_ids):
        raise ValueError(f"{len(request.sample_ids)} sample ids came with {len(request.seeds)} seeds")
    return [
        SampleRequest(
            request.prompt_ids,
            sample_id,
            seed,
            request.sampling,
            request.group_id,
            request.record_routes,
            cache_key=request.cache_key,
        )
        for sample_id, seed in zip(request.sample_ids, request.seeds, strict=True)
    ]


@dataclass(frozen=True)
class Asked:
    """Request as it was sent: everything an answer is checked against."""

    sample: SampleRequest
    weight_version: int
    """Version of the weights of every token."""
    request_id: str = ""
    """Name of the request at the server; empty: the server chooses one."""

    def most_bytes(self, facts: ModelFacts, kept_limit: int) -> int:
        """Return an upper bound of the answer's size: routes of the longest response in base64, and text.

        Args:
            kept_limit: top_k of the sets of kept tokens in the answer; 0: it has none.
        """
        max_new_tokens = self.sample.sampling.max_new_tokens
        rows = len(self.sample.prompt_ids) + max_new_tokens - 1 - self.sample.first_row
        routes = rows * facts.num_layers * facts.top_k * _ID_BYTES if self.sample.record_routes else 0
        token_bytes = _TOKEN_BYTES + kept_limit * _TIES * _KEPT_BYTES
        return 4 * (routes // 3 + 1) + max_new_tokens * token_bytes + _HEAD_BYTES


@dataclass(frozen=True)
class Sample:
    """Checked answer to a `SampleRequest`."""

    trajectory: Trajectory
    """Trajectory; rows of its routes before `first_row` are unknown."""
    from_cache: bool
    """True if the engine reports the first `cached_rows` tokens as cached and not recomputed."""


Ask = Callable[[SampleRequest], Awaitable[Sample]]
"""Send one request. Raises SampleError or RouteError; EngineError for every sample once the engine is down."""
