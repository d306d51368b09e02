"""Mixes of training-layout choices, drawn so that every pair of choices meets, and refused configurations.

Each dimension is a name with its choices; a mix takes one choice of each. `possible` accepts the mixes allowed by the
program and runnable on four processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from megatron_cases import Case

Mix = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

PIPELINES: dict[str, dict[str, Any]] = {
    "PP1": {},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 uneven": {
        "pipeline_model_parallel_size": 2,
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": 3,
    },
    "PP2 layout": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ettt|tL"},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "PP2 VPP2 layout": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|tt|t|tL"},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "stored": {},
    "recompute moe": {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    "recompute uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "recompute block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "optimizer whole": {},
    "optimizer sharded": {"use_distributed_optimizer": True},
    "optimizer sharded, overlapped": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
}
BATCHING: dict[str, dict[str, Any]] = {
    "fixed": {},
    "dynamic": {
        f"{name}_in_{way}": value
        for way in ("train", "infer")
        for name, value in {"use_dynamic_batching": True, "max_tokens_per_microbatch": 64}.items()
    },
}
MODELS = ("qwen3_moe", "qwen3_moe_mixed", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3", "moonlight")

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "TP": ("TP1", "TP2"),
    "PP": tuple(PIPELINES),
    "CP": ("CP1", "CP2"),
    "EP": ("EP1", "EP2", "EP4"),
    "ETP": ("ETP1", "ETP2"),
    "DP": ("DP1", "DP2", "DP4"),
    "dispatcher": ("alltoall", "allgather"),
    "optimizer": tuple(OPTIMIZERS),
    "recompute": tuple(RECOMPUTE),
    "rows": ("padded", "packed"),
    "batching": tuple(BATCHING),
    "alignment": ("round 1", "round 3"),
    "replay": ("R3", "R3 with unknown rows", "R2"),
    "model": MODELS,
}
LARGEST = 4
"""Largest number of processes."""


@dataclass(frozen=True)
class Sizes:
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    dp: int

    @classmethod
    def of(cls, mix: Mix) -> Sizes:
        numbers = {name: int(mix[name].split()[0][len(name) :]) for name in ("TP", "PP", "CP", "EP", "ETP", "DP")}
        return cls(**{name.lower(): number for name, number in numbers.items()})

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


def possible(mix: Mix) -> bool:
    """Return True if the mix is allowed and four processes can run it."""
    size = Sizes.of(mix)
    stage = size.tp * size.cp * size.dp
    return (
        size.processes <= LARGEST
        and stage % (size.ep * size.etp) == 0
        and size.etp <= size.tp
        # without expert parallelism experts are split like everything else
        and (size.ep > 1 or size.etp == size.tp)
        and (mix["dispatcher"] == "alltoall" or size.pp == 1)
        and not (
            size.ep > 1 and (mix["dispatcher"], mix["batching"], mix["rows"]) == ("allgather", "dynamic", "padded")
        )
    )


def pairs(mix: Mix) -> set[Pair]:
    """Return the pairs of choices in a mix."""
    return set(combinations(sorted(mix.items()), 2))


@cache
def draw(seed: int = 0, tries: int = 3000) -> tuple[Mix, ...]:
    """Return a small set of mixes in which every possible pair of choices meets; one seed always gives the same set.

    Greedy: from many random mixes, take the one with the most new pairs.
    """
    random = Random(seed)

    def candidate() -> Mix:
        while not possible(mix := {name: random.choice(choices) for name, choices in DIMENSIONS.items()}):
            pass
        return mix

    pool = [candidate() for _ in range(tries)]
    wanted: set[Pair] = set().union(*(pairs(mix) for mix in pool))
    drawn: list[Mix] = []
    while wanted:
        best = max(pool, key=lambda mix: len(pairs(mix) & wanted))
        drawn.append(best)
        wanted -= pairs(best)
    return tuple(drawn)


def name_of(mix: Mix) -> str:
    """Return the choices different from the first, plain one of their dimension."""
    return ", ".join(
        [mix["model"], mix["replay"]]
        + [choice for name, choice in mix.items() if name not in ("model", "replay") and choice != DIMENSIONS[name][0]]
    )


def case_of(mix: Mix, checkpoint: Path) -> Case:
    """Return the mix as a case to run; EP and ETP are written only if they are not the default."""
    size = Sizes.of(mix)
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": size.tp,
        "context_parallel_size": size.cp,
        "expert_model_parallel_size": size.ep,
        "moe_token_dispatcher_type": mix["dispatcher"],
        **PIPELINES[mix["PP"]],
        **RECOMPUTE[mix["recompute"]],
        **OPTIMIZERS[mix["optimizer"]],
    }
    if size.etp != (1 if size.ep > 1 else size.tp):
        layout["expert_tensor_parallel_size"] = size.etp
    return Case(
        str(checkpoint),
        layout,
        mode=mix["replay"][:2],
        packed=mix["rows"] == "packed",
        micro_batch_size=1 if size.dp == 4 else 2,
        infer_batch_size=3 if mix["batching"] == "fixed" else None,
        log_probs_first=True,
        role={
            "router_replay": {"mode": mix["replay"][:2], "audit": True},
            "sequence_length_round": int(mix["alignment"].split()[1]),
            **BATCHING[mix["batching"]],
        },
    )


REFUSED: dict[str, list[str]] = {
    "R3 in the trainer alone": ["actor_infer.router_replay.mode=disable"],
    "R3 in the rollout alone": ["actor_train.router_replay.mode=disable"],
    "R2 in the rollout": ["actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=R2"],
    "replay in the reference": ["use_kl_loss=true", "reference={router_replay: {mode: R3}}"],
    "replay with the fused router": ["{train}.moe_router_fusion=true"],
    "a load-balancing loss": ["{train}.moe_aux_loss_coeff=0.01"],
    "TP without SP": ["{devices}=[0, 1]", "{train}.tensor_model_parallel_size=2", "{train}.sequence_parallel=false"],
    "VPP without PP": ["{train}.virtual_pipeline_model_parallel_size=2"],
    "allgather with PP": [
        "{devices}=[0, 1]",
        "{train}.pipeline_model_parallel_size=2",
        "{train}.moe_token_dispatcher_type=allgather",
    ],
    "allgather with EP, dynamic, padded": [
        "{devices}=[0, 1]",
        "{train}.expert_model_parallel_size=2",
        "{train}.moe_token_dispatcher_type=allgather",
        "actor_train.use_dynamic_batching_in_train=true",
        "actor_train.max_tokens_per_microbatch_in_train=4096",
    ],
    "ETP above TP": ["{devices}=[0, 1]", "{train}.expert_tensor_parallel_size=2"],
    "ETP below TP without EP": [
        "{devices}=[0, 1]",
        "{train}.tensor_model_parallel_size=2",
        "{train}.expert_tensor_parallel_size=1",
    ],
}
"""Refused configurations: overrides of a sound configuration."""

REFUSED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid gates that are not renormalised": ("deepseek_v3", {"norm_topk_prob": False}),
    "groups rated by more than two experts": ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 4}),
    "latent attention with halves rotated": ("deepseek_v3", {"rope_interleave": False}),
    "a sliding window": ("mixtral", {"sliding_window": 128}),
    "clipped Q, K and V": ("olmoe", {"clip_qkv": 8.0}),
    "scaled rotary embeddings": (
        "qwen3_moe",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "another activation": ("qwen2_moe", {"hidden_act": "gelu"}),
    "rotary embeddings of a part of a head": ("qwen3_moe", {"partial_rotary_factor": 0.5}),
    "one expert with sigmoid gates": ("moonlight", {"num_experts_per_tok": 1}),
    "one expert with gates that are renormalised": ("mixtral", {"num_experts_per_tok": 1}),
    "quantized weights": ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}),
}
"""Refused checkpoints: a tiny model, and changed fields of its config.json."""
