"""Batched sampling with a KV cache.

Shape legend: B samples, S inputs of a forward (prompts are padded on the left), V vocabulary, M MoE layers, K experts
per token, R rows of routes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.hf.routers import RouteRecorder
from roll_r3.engines.sample import SampleRequest


@dataclass
class Sampled:
    """One response."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Log-probabilities under the temperature: over the kept tokens if these are returned, else over the vocabulary."""
    kept: list[list[int]] = field(default_factory=list)
    """Set of tokens that each token was sampled from; empty if not requested."""
    finish_reason: Literal["stop", "length"] = "length"
    routes: list[torch.Tensor] = field(default_factory=list)
    """Expert ids of the processed tokens, prompt first, in parts of [M, R, K]; empty if none are recorded."""


@dataclass(frozen=True)
class Stop:
    """The end of a response."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    """Function from token ids to text, special tokens included."""

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Return True if the last token is an end token, or completes a stop string."""
        if token_ids[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        longest = max(len(text.encode()) for text in self.strings)
        tail = self.decode(token_ids[-longest - 1 :])  # a token is at least one byte
        return any(text in tail for text in self.strings)


@torch.inference_mode()
def sample(
    model: Any,
    jobs: Sequence[SampleRequest],
    settings: Sampling,
    *,
    stop: Stop,
    recorder: RouteRecorder | None,
) -> list[Sampled]:
    """Decode one batch until each sample has stopped or reached its length. Results in the order of `jobs`.

    A sample's tokens follow from its seed and its own probabilities. The other samples of the batch change these by
    rounding only: another batch shape is another order of sums.

    Raises:
        RouteError: a router did not run exactly once in a forward.
    """
    if recorder is not None:
        recorder.clear()
    ids_BS, mask_BS = _padded([job.prompt_ids for job in jobs], model.device)
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    inputs_BS, real_BS = ids_BS, mask_BS.bool().cpu()
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    results = [Sampled() for _ in jobs]
    running = list(range(len(jobs)))
    cache = None
    for _ in range(settings.max_new_tokens):
        output = model(
            input_ids=inputs_BS,
            attention_mask=mask_BS,
            position_ids=positions_BS,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        if recorder is not None:
            ids_MNK = recorder.take()
            ids_MBSK = ids_MNK.reshape(len(ids_MNK), len(jobs), -1, ids_MNK.shape[-1])
            for b in running:
                results[b].routes.append(ids_MBSK[:, b, real_BS[b]])
        log_probs_BV = torch.log_softmax(output.logits[:, -1].float() / settings.temperature, -1)
        kept_BV = _kept(log_probs_BV, settings)
        draws_B = torch.tensor([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        tokens_B = choose(log_probs_BV.masked_fill(~kept_BV, -torch.inf), draws_B.to(log_probs_BV.device))
        if settings.return_kept:
            log_probs_BV = log_probs_BV.masked_fill(~kept_BV, -torch.inf).log_softmax(-1)
        chosen_B = log_probs_BV.gather(-1, tokens_B[:, None])[:, 0].tolist()
        for b, token in enumerate(tokens_B.tolist()):
            if b in running:
                results[b].token_ids.append(token)
                if settings.return_kept:
                    results[b].kept.append(kept_BV[b].nonzero()[:, 0].tolist())
                results[b].log_probs.append(min(chosen_B[b], 0.0))
                if stop.ends(results[b].token_ids):
                    results[b].finish_reason = "stop"
                    running.remove(b)
        if not running:
            break
        inputs_BS, real_BS = tokens_B[:, None], torch.ones(len(jobs), 1, dtype=torch.bool)
        positions_BS = positions_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], -1)
    return results


def _kept(log_probs_BV: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """Return the mask of the tokens to sample among: of greedy sampling the likeliest one. bool [B, V]"""
    if settings.greedy:
        return kept_tokens(log_probs_BV, top_p=1.0, top_k=1)
    return kept_tokens(log_probs_BV, top_p=settings.top_p, top_k=settings.top_k)


def kept_tokens(log_probs_BV: torch.Tensor, *, top_p: float, top_k: int) -> torch.Tensor:
    """Return the mask of the tokens to sample among. bool [B, V]

    Args:
        top_p: cumulated probability of the kept likeliest tokens, before top_k.
        top_k: number of kept likeliest tokens; -1: all.
    """
    if top_p == 1 and top_k < 1:
        return torch.ones_like(log_probs_BV, dtype=torch.bool)
    ordered_BV, order_BV = log_probs_BV.double().exp().sort(dim=-1, descending=True, stable=True)
    kept_BV = ordered_BV.cumsum(-1) - ordered_BV < top_p
    if top_k > 0:
        kept_BV[:, top_k:] = False
    kept_BV[:, 0] = True
    return torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)


def choose(log_probs_BV: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    """Choose a token for each row, by inversion of the distribution function. [B]

    Args:
        log_probs_BV: up to a constant per row; -inf: not to choose.
        draws_B: uniform in [0, 1), fp64.
    """
    summed_BV = log_probs_BV.double().exp().cumsum(-1)
    below_B1 = draws_B[:, None] * summed_BV[:, -1:]
    return torch.searchsorted(summed_BV, below_B1, right=True)[:, 0].clamp(max=log_probs_BV.shape[-1] - 1)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids padded on the left, and a mask with 1 for real ids. [B, S] each"""
    longest = max(map(len, prompts))
    ids_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BS[row, longest - len(prompt) :] = 1
    return ids_BS.to(device), mask_BS.to(device)
