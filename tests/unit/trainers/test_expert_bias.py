"""Loads behind the moves of DeepSeek's expert bias: real tokens, each once, by the experts used."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import read_held
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING, Layout

EXPERTS, TOP_K, HIDDEN, LENGTHS = 8, 2, 4, (3, 6)


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    total = sum(LENGTHS)
    ids = [rng.random((1, n, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8) for n in LENGTHS]
    return Batch(
        sample_ids=("a", "b"),
        lengths_n=np.array(LENGTHS),
        input_ids_N=np.arange(total),
        labels_N=np.arange(total),
        loss_mask_N=np.ones(total, np.bool_),
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=tuple(RoutedExperts(x) for x in ids),
    )


class _Chunk(torch.nn.Module):
    """One real router, and an output for backward."""

    def __init__(self, *, recompute: bool) -> None:
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOP_K,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            add_bias_linear=False,
        )
        groups: Any = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
        self.router = TopKRouter(config, groups)
        torch.nn.init.normal_(self.router.weight, generator=torch.Generator().manual_seed(1))
        self.recompute = recompute
        self.maps: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.recompute:
            return torch.utils.checkpoint.checkpoint(self._route, hidden, use_reentrant=True) * 1.0
        return self._route(hidden) * 1.0

    def _route(self, hidden: torch.Tensor) -> torch.Tensor:
        probs, routing_map = self.router(hidden)
        self.maps.append(routing_map)
        return probs.square().sum(-1) * hidden.reshape(-1, HIDDEN).sum(-1)


@pytest.fixture
def chunk_of() -> Any:
    from roll_r3.platform import megatron_cpu

    megatron_cpu.install()
    return lambda recompute=False: _Chunk(recompute=recompute)


def _replayed(chunk: _Chunk, micro_batches: list[Any]) -> tuple[Any, list[Any]]:
    from roll_r3.models.facts import ModelFacts
    from roll_r3.replay.session import replaying
    from roll_r3.trainers.megatron.routers import Router

    return replaying(
        micro_batches,
        [[Router(chunk.router, 0, chunk.recompute)]],
        facts=ModelFacts("test", 1, (0,), EXPERTS, TOP_K, 1, 1, 32, 64),
        ep_size=1,
        device=torch.device("cpu"),
        layer_rows={0: 0},
        read=read_held,
        forward_only=False,
        compares=False,
    )


def _hidden(micro: Any, seed: int) -> torch.Tensor:
    tokens = len(micro.tokens.router_slots_t)
    return torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _run(chunk: _Chunk, micro_batches: list[Any], mode: str = "R3", *, fail: bool = False) -> None:
    """Run all forwards, then all backwards; without replay, the last micro-batch's first."""
    from roll_r3.trainers.megatron.expert_bias import RealTokenCounts

    counts = RealTokenCounts([chunk])
    session = None
    if mode == "R3":
        session, micro_batches = _replayed(chunk, micro_batches)
    with session or nullcontext(), counts:
        outputs = []
        for seed, micro in enumerate(micro_batches):
            with ExitStack() as stack:
                if session:
                    stack.enter_context(session.micro_batch(0, micro))
                stack.enter_context(counts.forward(0, micro))
                outputs.append(chunk(_hidden(micro, seed)))
            counts.await_backward(0, micro, outputs[-1])
        for output in outputs if session else reversed(outputs):
            output.sum().backward()
        if fail:
            raise ZeroDivisionError


def _loads(chunk: _Chunk, micro_batches: list[Any]) -> torch.Tensor:
    """Count real tokens alone, in loops over the first pass of every micro-batch. [E]"""
    loads = torch.zeros(EXPERTS)
    for routing_map, micro in zip(chunk.maps, micro_batches, strict=False):
        for slot, experts in zip(micro.tokens.router_slots_t, routing_map, strict=True):
            if slot != PADDING and micro.counted:
                loads += experts
    return loads


@pytest.mark.parametrize("mode", ["R3", "disable"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(packed=True, sp_size=4, sp_rank=3), Layout(cp_size=2, cp_rank=1), Layout(sp_size=2, sp_rank=1)],
)
def test_only_real_tokens_count_and_each_once(layout: Layout, recompute: bool, mode: str, chunk_of: Any) -> None:
    from roll_r3.trainers.cutting import cut

    chunk = chunk_of(recompute)
    micro_batches = cut(_batch(), [np.array([0, 1]), np.array([0])], layout)
    micro_batches.append(replace(micro_batches[0], counted=False))
    assert any((micro.tokens.router_slots_t == PADDING).any() for micro in micro_batches[:2])

    _run(chunk, micro_batches, mode)

    assert len(chunk.maps) == 3 * (2 if recompute else 1)
    wanted = _loads(chunk, micro_batches)
    assert torch.equal(chunk.router.local_tokens_per_expert, wanted)
    real = sum(int((micro.tokens.router_slots_t != PADDING).sum()) for micro in micro_batches[:2])
    assert wanted.sum() == real * TOP_K > 0
    if mode == "R3":
        recorded = np.zeros(EXPERTS)
        for micro in micro_batches[:2]:
            rows = np.concatenate([routes.ids_MRK[0] for routes in micro.batch.routes])
            for slot in micro.tokens.router_slots_t[micro.tokens.router_slots_t != PADDING]:
                recorded[rows[slot]] += 1
        assert wanted.tolist() == recorded.tolist(), "the loads are those of the recorded routes"


def test_a_pass_without_gradients_counts_nothing(chunk_of: Any) -> None:
    from roll_r3.trainers.cutting import cut
    from roll_r3.trainers.megatron.expert_bias import RealTokenCounts

    chunk = chunk_of()
    (micro,) = cut(_batch(), [np.arange(2)], Layout())
    counts = RealTokenCounts([chunk])
    with torch.no_grad(), counts, counts.forward(0, micro):
        chunk(_hidden(micro, 0))
    assert not chunk.router.local_tokens_per_expert.any()


def test_a_failed_schedule_leaves_no_counts_and_no_hooks(chunk_of: Any) -> None:
    from roll_r3.trainers.cutting import cut

    chunk = chunk_of()
    micro_batches = cut(_batch(), [np.arange(2)], Layout())
    with pytest.raises(ZeroDivisionError):
        _run(chunk, micro_batches, fail=True)
    assert not chunk.router.local_tokens_per_expert.any()
    assert not chunk.router._forward_hooks


def test_bf16_weights_do_not_coarsen_the_counts(chunk_of: Any) -> None:
    from roll_r3.trainers.cutting import cut

    chunk = chunk_of()
    chunk.router.local_tokens_per_expert.data = torch.full((EXPERTS,), 256.0, dtype=torch.bfloat16)
    micro_batches = cut(_batch(), [np.array([i % 2]) for i in range(3)], Layout())
    _run(chunk, micro_batches)
    assert torch.equal(chunk.router.local_tokens_per_expert, 256 + _loads(chunk, micro_batches))
