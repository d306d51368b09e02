"""What replay costs a training step: the same batch with R3 and without, in turn, in one process.

    .venv/bin/python examples/benchmarks/replay_step_time.py --checkpoint output/tiny/qwen3_moe

Prints one JSON object: median seconds of each, the median of the pairwise ratios, and the share of the R3 step that the
trainer's own clock gives to routes. Pairs run back to back, so a machine that drifts moves both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.strategies.base import ProcessInfo
from roll_r3.strategies.train.megatron.strategy import MegatronTrain

PORT = 29555


def random_batch(facts: ModelFacts, samples: int, tokens: int) -> Batch:
    """Samples of random tokens and random distinct experts."""
    rng = np.random.default_rng(0)
    shape = (len(facts.moe_layers), tokens - 1, facts.num_experts)
    trajectories = [
        Trajectory(
            sample_id=str(i),
            prompt_ids_P=rng.integers(0, 256, tokens // 2).astype(np.int32),
            response_ids_R=rng.integers(0, 256, tokens - tokens // 2).astype(np.int32),
            log_probs_R=np.full(tokens - tokens // 2, -5.0, np.float32),
            finish_reason="length",
            weight_versions=(0,),
            routes=RoutedExperts(
                rng.random(shape).argsort(-1)[..., : facts.top_k].astype(route_dtype(facts.num_experts))
            ),
        )
        for i in range(samples)
    ]
    batch = Batch.from_trajectories(trajectories)
    advantages_N = np.where(batch.loss_mask_N, 1.0, 0.0).astype(np.float32)
    return replace(batch, advantages_N=advantages_N, old_log_probs_N=batch.rollout_log_probs_N)


def trainer(checkpoint: str, mode: str, samples: int, tokens: int) -> MegatronTrain:
    layout = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = RLVRConfig(
        exp_name="benchmark",
        pretrain=checkpoint,
        rollout_batch_size=1,
        num_return_sequences_in_group=samples,
        prompt_length=tokens,
        response_length=tokens,
        actor_train={
            "model_args": {"dtype": "fp32"},
            "router_replay": {"mode": mode},
            "data_args": {"file_name": "bundled:addition_mod10"},
            "training_args": {"per_device_train_batch_size": samples // 2, "gradient_accumulation_steps": 2},
            "strategy_args": {"strategy_config": layout},
        },
        actor_infer={"router_replay": {"mode": mode}},
    )
    strategy = MegatronTrain(config, "actor_train", ProcessInfo(master_port=PORT))
    strategy.initialize()
    return strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = read_facts(args.checkpoint)
    batch = random_batch(facts, args.samples, args.tokens)
    with_replay, without = (trainer(args.checkpoint, mode, args.samples, args.tokens) for mode in ("R3", "disable"))
    plain = replace(batch, routes=None)
    seconds: dict[str, list[float]] = {"R3": [], "disable": []}
    shares = []
    for step in range(1, args.pairs + 2):
        for mode, strategy, data in (("R3", with_replay, batch), ("disable", without, plain)):
            start = time.perf_counter()
            result = strategy.train_step(data, step)
            seconds[mode].append(time.perf_counter() - start)
            if mode == "R3":
                shares.append(result.seconds_in_routes / seconds[mode][-1])
    pairs = list(zip(seconds["R3"][1:], seconds["disable"][1:], strict=True))  # the first pair warms up
    report = {
        "tokens_per_step": args.samples * (args.tokens - 1),
        "pairs": len(pairs),
        "median_s_R3": round(statistics.median(a for a, _ in pairs), 4),
        "median_s_disable": round(statistics.median(b for _, b in pairs), 4),
        "median_ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "median_share_on_routes": round(statistics.median(shares[1:]), 4),
    }
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
