"""Settings that an engine gets with each request."""

from __future__ import annotations

from dataclasses import dataclass

KEPT_LIMIT = 2048
"""Number of likeliest tokens to sample among where sets are returned and top_p alone truncates. SGLang and vLLM return
sets under a finite top_k only. The returned set has this limit in it, so log-probabilities stay exact."""


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
    greedy: bool = False
    """Take the likeliest token each time; temperature, top_p and top_k have no effect."""
    return_kept: bool = False
    """True if an answer must hold the set of tokens that each token was sampled from, and log-probabilities over it;
    `top_k` is then finite."""

    @property
    def is_plain(self) -> bool:
        """True if tokens are sampled from the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k < 1
