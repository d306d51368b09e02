"""Settings that an engine gets with each request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, sent with each request."""

    max_new_tokens: int
    """Longest response in tokens."""
    temperature: float = 1.0
    """Divisor of the logits."""
    top_p: float = 1.0
    top_k: int = -1
    """Number of likeliest tokens to sample among; -1: all."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides the checkpoint's own. The response keeps the token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response. The response keeps the token that completes one."""
