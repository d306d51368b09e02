"""What it takes to get from routes as delivered to the index tensors of a micro-batch's routers.

    .venv/bin/python examples/benchmarks/route_preparation.py

By default one packed micro-batch of 72,951 inputs of Qwen3-30B-A3B's shape (48 MoE layers, top-8 of 128), on the second
of two tensor-parallel ranks (sequence parallelism) of the first of two pipeline stages. Prints one JSON object: the
shortest times of `staged` (the compact rows of all local layers lie ready) and `routed` (each layer has had its int64
indices too), and of what they are held against, made in turn with them:

    gather   one numpy `take` of the same compact bytes from one array of this stage's layers
    widened  that, and each layer's rows converted to int64 once
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.token_map import Layout
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.train.micro_batch import MicroBatch, cut
from roll_r3.strategies.train.replay import ReplaySession


class StubRouter:
    """A router without a model: it only holds what the session attaches."""

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


def random_batch(layers: int, experts: int, top_k: int, lengths: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    total = sum(lengths)
    return Batch(
        sample_ids=tuple(str(i) for i in range(len(lengths))),
        lengths_n=np.array(lengths),
        input_ids_N=np.zeros(total, np.int64),
        labels_N=np.zeros(total, np.int64),
        loss_mask_N=np.ones(total, np.bool_),
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=tuple(
            RoutedExperts(rng.integers(0, experts, (layers, n, top_k)).astype(route_dtype(experts))) for n in lengths
        ),
    )


def shortest(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Seconds that each call reports, the least of the repeats; they run in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            best[name] = min(best[name], call())
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=72_951)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages")
    parser.add_argument("--sp", type=int, default=2, help="ranks that split the sequence between blocks")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks")
    parser.add_argument("--padded", action="store_true", help="one padded row per sample instead of a packed row")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rng = np.random.default_rng(1)
    cuts = np.sort(rng.choice(np.arange(1, args.inputs), args.samples - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [args.inputs]])).tolist()
    batch = random_batch(args.layers, args.experts, args.top_k, lengths)
    layout = Layout(packed=not args.padded, cp_size=args.cp, sp_size=args.sp, sp_rank=args.sp - 1)
    micro = cut(batch, [np.arange(args.samples)], layout)[0]
    local = args.layers // args.stages
    slots_t = np.maximum(micro.tokens.router_slots_t, 0)
    routes = [r for r in batch.routes or () if isinstance(r, RoutedExperts)]
    ids_LNK = np.concatenate([r.ids_MRK[:local] for r in routes], axis=1)

    def gather() -> float:
        start = time.perf_counter()
        np.take(ids_LNK, slots_t, axis=1)
        return time.perf_counter() - start

    def widened() -> float:
        start = time.perf_counter()
        for ids_tK in torch.from_numpy(np.take(ids_LNK, slots_t, axis=1).astype(np.uint8, copy=False)):
            ids_tK.long()
        return time.perf_counter() - start

    calls = {
        "gather": gather,
        "staged": lambda: prepare(args, local, micro)[0],
        "widened": widened,
        "routed": lambda: prepare(args, local, micro)[1],
    }
    best = shortest(calls, args.repeats)
    report = {
        "shape": {k: v for k, v in vars(args).items() if k != "repeats"},
        "rows_of_this_rank": len(slots_t),
        "compact_bytes_of_this_rank": local * len(slots_t) * args.top_k * ids_LNK.itemsize,
        "ms": {name: round(1e3 * taken, 3) for name, taken in best.items()},
        "staged_over_gather": round(best["staged"] / best["gather"], 2),
        "routed_over_gather": round(best["routed"] / best["gather"], 2),
        "routed_over_widened": round(best["routed"] / best["widened"], 2),
    }
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def prepare(args: argparse.Namespace, local: int, micro: MicroBatch) -> tuple[float, float]:
    """Seconds until the rows lie ready, and until every layer has had its indices."""
    num_tokens = len(micro.tokens.router_slots_t)
    session = ReplaySession(
        [[StubRouter(layer) for layer in range(local)]],
        1,
        facts=ModelFacts("benchmark", args.layers, tuple(range(args.layers)), args.experts, args.top_k, 1, 1, 32, 64),
        ep_size=1,
        device=torch.device("cpu"),
        forward_only=False,
    )
    with session:
        start = time.perf_counter()
        with session.micro_batch(0, micro):
            staged = time.perf_counter() - start
            for layer in session.layers[0]:
                layer.route(num_tokens, args.top_k, _no_live_choice)
            routed = time.perf_counter() - start
        for layer in session.layers[0]:
            layer.route(num_tokens, args.top_k, _no_live_choice)  # backward's recompute
    return staged, routed


def _no_live_choice() -> torch.Tensor:
    raise AssertionError("every row is known")


if __name__ == "__main__":
    main()
