"""Preparation of routes: from delivered routes to the index tensors of a micro-batch's routers.

    .venv/bin/python -m examples.benchmarks route_preparation

One packed micro-batch of Qwen3-30B-A3B's shape (48 MoE layers, top-8 of 128), prepared like one rank of a layout.
Nothing else of the layout runs: a rank's token map and session are made in this process. Two clocks, each against a
minimal baseline:

    staged   until the compact rows of all layers of the rank are ready. Against one numpy `take` of the same rows
    routed   until each layer has its int64 indices too. Against this `take`, and one conversion of each layer to int64
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from examples.benchmarks.measuring import (
    Clock,
    Report,
    facts,
    in_fresh_process,
    in_turn,
    peak_bytes,
    random_routes,
    ratio,
    rounded,
    timed,
)
from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import ReadRoutes, read_held
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import Layout
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.session import ReplaySession, replaying
from roll_r3.trainers.cutting import cut

MODEL = "Qwen/Qwen3-30B-A3B"
SAMPLES = 8
TOKENS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
RANKS = (1, 2, 4, 8)
MEMORY_FROM = 1 << 18
"""Minimum tokens of a micro-batch to distinguish the memory of preparation from the interpreter's."""


@dataclass(frozen=True)
class Rank:
    """Last rank of a layout, and its micro-batch."""

    tokens: int
    """Inputs of the micro-batch over all ranks sharing it."""
    sp: int = 1
    """Ranks splitting the sequence between blocks (tensor parallelism)."""
    cp: int = 1
    stages: int = 1
    packed: bool = True

    @property
    def layout(self) -> Layout:
        return Layout(packed=self.packed, cp_size=self.cp, cp_rank=self.cp - 1, sp_size=self.sp, sp_rank=self.sp - 1)

    def layers(self, model: ModelFacts) -> range:
        return range(len(model.moe_layers) // self.stages)


class StubRouter:
    """Router without a model, holding the session's attachments only."""

    recomputed = True

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.held: Any = None

    @property
    def attached(self) -> bool:
        return self.held is not None

    def attach(self, layer: Any) -> None:
        self.held = layer

    def detach(self) -> None:
        self.held = None


def measure(rounds: int) -> Report:
    """Measure all figures."""
    tokens = 1 << 16
    layouts = {
        "TP with SP": [Rank(tokens, sp=size) for size in RANKS],
        "CP": [Rank(tokens, cp=size) for size in RANKS],
        "PP": [Rank(tokens, stages=size) for size in RANKS],
    }
    return {
        "model": MODEL,
        "growth": [cost(Rank(tokens, sp=2, stages=2), rounds) for tokens in TOKENS],
        "ranks": {name: [cost(rank, rounds) for rank in ranks] for name, ranks in layouts.items()},
        "memory": [
            memory(rank)
            for rank in (
                Rank(MEMORY_FROM),
                Rank(MEMORY_FROM, stages=2),
                Rank(MEMORY_FROM, sp=2, stages=2),
                Rank(MEMORY_FROM, cp=2, stages=2),
                Rank(1 << 20, sp=2, stages=2),
            )
        ],
    }


def delivered(model: ModelFacts, lengths: list[int]) -> tuple[RoutedExperts, ...]:
    """Routes of a sample in the form received by a rank; `Batch.routes` accepts them unchanged."""
    rng = np.random.default_rng(0)
    return tuple(RoutedExperts(random_routes(rng, model, length)) for length in lengths)


def micro_batch(model: ModelFacts, rank: Rank) -> MicroBatch:
    """Make one micro-batch of samples of uneven lengths, as seen by the rank."""
    rng = np.random.default_rng(1)
    ends = np.sort(rng.choice(np.arange(1, rank.tokens), SAMPLES - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], ends, [rank.tokens]]))
    batch = Batch(
        sample_ids=tuple(str(i) for i in range(SAMPLES)),
        lengths_n=lengths,
        input_ids_N=np.zeros(rank.tokens, np.int64),
        labels_N=np.zeros(rank.tokens, np.int64),
        loss_mask_N=np.ones(rank.tokens, np.bool_),
        rollout_log_probs_N=np.zeros(rank.tokens, np.float32),
        routes=delivered(model, lengths.tolist()),
    )
    return cut(batch, [np.arange(SAMPLES)], rank.layout)[0]


def cost(rank: Rank, rounds: int) -> Report:
    """Measure both clocks against their baselines, and this rank's share of the rows."""
    torch.set_num_threads(1)
    model = facts(MODEL)
    micro = micro_batch(model, rank)
    layers = rank.layers(model)
    slots_t = np.maximum(micro.tokens.router_slots_t, 0)
    routes = [sample for sample in micro.batch.routes or () if isinstance(sample, RoutedExperts)]
    ids_LNK = np.concatenate([sample.ids_MRK[layers.start : layers.stop] for sample in routes], axis=1)

    def widened() -> None:
        for ids_tK in torch.from_numpy(np.take(ids_LNK, slots_t, axis=1)):
            ids_tK.long()

    seconds = in_turn(
        {
            "gather": timed(lambda: np.take(ids_LNK, slots_t, axis=1)),
            "staged": preparation(model, micro, layers, routed=False),
            "widened": timed(widened),
            "routed": preparation(model, micro, layers, routed=True),
        },
        rounds,
    )
    return {
        "tokens": rank.tokens,
        "sp": rank.sp,
        "cp": rank.cp,
        "stages": rank.stages,
        "rows_of_the_rank_over_an_even_share": rounded(len(slots_t) * rank.sp * rank.cp / rank.tokens),
        "staged_over_gather": ratio(seconds["staged"], seconds["gather"]),
        "routed_over_widened": ratio(seconds["routed"], seconds["widened"]),
        "routed_over_gather": ratio(seconds["routed"], seconds["gather"]),
    }


def memory(rank: Rank) -> Report:
    """Measure the peak memory of preparation above its inputs, in its own process, over the compact rows."""
    peak, rows = in_fresh_process(_peak, rank)
    return {
        "tokens": rank.tokens,
        "sp": rank.sp,
        "cp": rank.cp,
        "stages": rank.stages,
        "peak_over_rows": rounded(peak / rows),
    }


def _peak(rank: Rank) -> tuple[int, int]:
    """Return bytes: the peak, and the compact rows."""
    torch.set_num_threads(1)
    model = facts(MODEL)
    layers = rank.layers(model)
    # what torch and numpy set up with their first call is no part of it
    preparation(model, micro_batch(model, replace(rank, tokens=256)), layers, routed=True)()
    micro = micro_batch(model, rank)
    clock = preparation(model, micro, layers, routed=True)
    rows = len(layers) * len(micro.tokens.router_slots_t) * model.top_k
    return peak_bytes(clock), rows


def preparation(model: ModelFacts, micro: MicroBatch, layers: range, *, routed: bool) -> Clock:
    """Return a clock running until the rows are ready, or until every layer has its indices."""
    num_tokens = len(micro.tokens.router_slots_t)

    def clock() -> float:
        session, [delivered] = replayed(model, [micro], [layers], read_held)
        with session:
            start = time.process_time()
            with session.micro_batch(0, delivered):
                taken = time.process_time() - start
                for layer in session.layers[0]:
                    layer.route(num_tokens, model.top_k, no_live_choice)
                if routed:
                    taken = time.process_time() - start
            for layer in session.layers[0]:
                layer.route(num_tokens, model.top_k, no_live_choice)  # backward's recompute
        return taken

    return clock


def replayed(
    model: ModelFacts, micro_batches: Sequence[MicroBatch], chunks: Sequence[range], read: ReadRoutes
) -> tuple[ReplaySession, list[MicroBatch]]:
    """Make a session over routers without a model, and its micro-batches with their routes.

    Args:
        chunks: MoE layers of each chunk, counted from the model's first.
    """
    return replaying(
        micro_batches,
        [[StubRouter(model.moe_layers[row]) for row in layers] for layers in chunks],
        facts=model,
        ep_size=1,
        device=torch.device("cpu"),
        layer_rows={layer: row for row, layer in enumerate(model.moe_layers)},
        read=read,
        forward_only=False,
        compares=False,
    )


def no_live_choice() -> torch.Tensor:
    raise AssertionError("every row is known")
