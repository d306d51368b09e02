"""Cost of replay per training step: the same batch with R3 and without, alternating in the same processes.

    .venv/bin/python -m examples.benchmarks replay_step_time

Megatron runs whole training steps, optimizer included, one thread per process. R3 replays the rows chosen by the live
router, computed by transformers' model of the same weights; the weights hardly move at a learning rate of 1e-12. So the
experts do the same work with and without, and the difference is replay.

One trainer takes all steps, so that all find the same memory. Steps with R3, without, and without again alternate; each
round gives ratios of wall time, and of processor time over all ranks. Other programs on the same cores disturb
processor time less, though shared caches still slow it. They only ever add time, so the fastest step of each kind is
compared too. `share_on_routes` is from the trainer's own clock: wall time of the slowest rank on routes, over that of
its step.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM

from examples.benchmarks.measuring import Report, ratio, rounded, routes_of
from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.model_role import model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.workers import ReplayMode
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers.world import host_store

if TYPE_CHECKING:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

logger = logging.getLogger(__name__)

ARMS: dict[str, ReplayMode] = {"R3": "R3", "without": "disable", "control": "disable"}
"""Kind of step -> its replay mode. The control is a second one without, to show the noise of the machine."""
MICRO_BATCHES = 2
"""Number of micro-batches per step."""


@dataclass(frozen=True)
class Model:
    """Qwen3-MoE model of random weights, and its step."""

    name: str
    samples: int
    tokens: int
    """Number of tokens per sample."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json other than the tiny model's."""


@dataclass(frozen=True)
class Layout:
    name: str
    processes: int
    settings: dict[str, Any]
    packed: bool


TINY = Model("tiny", samples=32, tokens=129)
LARGER = Model(
    "larger",
    samples=8,
    tokens=257,
    fields={
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 128,
    },
)
RECOMPUTED = Layout(
    "one process, full recompute",
    1,
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    packed=False,
)
SPLIT = Layout("TP 2 with SP, packed", 2, {"tensor_model_parallel_size": 2}, packed=True)


def measure(rounds: int) -> Report:
    """Measure all figures. Steps are noisy, the tiny model's most: these take more rounds than requested."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for model, each in ((TINY, 3 * rounds), (LARGER, 2 * rounds)):
            checkpoint = make_tiny_checkpoint(Path(folder) / model.name, **model.fields)
            cases += [compare(checkpoint, model, layout, each) for layout in (RECOMPUTED, SPLIT)]
    return {"cases": cases}


def compare(checkpoint: Path, model: Model, layout: Layout, rounds: int) -> Report:
    """Run steps of each kind alternately, in the processes of the layout."""
    batch = batch_of(checkpoint, model)
    with tempfile.TemporaryDirectory() as folder:
        store = host_store("127.0.0.1")
        arguments = (layout, str(checkpoint), batch, rounds, store.port, folder)
        # a rank that fails ends the others
        spawn(_run_rank, arguments, nprocs=layout.processes)
        ranks = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(layout.processes)]
    wall, cpu = (
        {arm: [reduce(each) for each in zip(*(rank[clock][arm] for rank in ranks), strict=True)] for arm in ARMS}
        for clock, reduce in (("wall", max), ("cpu", sum))
    )
    shares = [max(each) for each in zip(*(rank["share"] for rank in ranks), strict=True)]
    facts = read_facts(checkpoint)
    report = {
        "model": model.name,
        "layout": layout.name,
        "hidden_size": model.fields.get("hidden_size", 64),
        "moe_layers": len(facts.moe_layers),
        "experts": facts.num_experts,
        "top_k": facts.top_k,
        "tokens_per_step": int(batch.lengths_n.sum()),
        "wall": ratio(wall["R3"], wall["without"]),
        "cpu": ratio(cpu["R3"], cpu["without"]),
        "cpu_of_the_control": ratio(cpu["control"], cpu["without"]),
        "cpu_of_the_fastest": rounded(min(cpu["R3"]) / min(cpu["without"] + cpu["control"])),
        "share_on_routes": rounded(statistics.median(shares)),
        "rows_as_the_live_router": rounded(min(rank["agreement"] for rank in ranks)),
        "median_step_s": rounded(statistics.median(wall["without"])),
    }
    logger.info("%s", report)  # the next one takes minutes
    return report


def batch_of(checkpoint: Path, model: Model) -> Batch:
    """Make samples of random tokens, with the routes of the live model."""
    rng = np.random.default_rng(0)
    facts = read_facts(checkpoint)
    ids = rng.integers(0, 256, (model.samples, model.tokens)).astype(np.int32)
    half = model.tokens // 2
    trajectories = [
        Trajectory.one_turn(
            str(i),
            str(i),
            prompt_ids=ids[i, :half],
            response_ids=ids[i, half:],
            log_probs=np.full(model.tokens - half, -5.0, np.float32),
            version=0,
            finish_reason="length",
            routes=routes,
        )
        for i, routes in enumerate(live_routes(checkpoint, facts, ids[:, :-1]))
    ]
    batch = Batch.from_trajectories(trajectories)
    advantages_N = np.where(batch.loss_mask_N, 1.0, 0.0).astype(np.float32)
    return replace(batch, advantages_N=advantages_N, old_log_probs_N=batch.rollout_log_probs_N)


def live_routes(
    checkpoint: Path, facts: ModelFacts, ids_nR: np.ndarray[Any, np.dtype[np.int32]]
) -> list[RoutedExperts]:
    """Return the choices of the routers of transformers' model; every decoder layer is MoE."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    routes = []
    for ids_R in ids_nR:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids_R[None].astype(np.int64)), output_router_logits=True)
        chosen_MRK = torch.stack([scores_RE.topk(facts.top_k).indices for scores_RE in logits.router_logits])
        routes.append(RoutedExperts(routes_of(chosen_MRK.numpy(), facts)))
    return routes


def trainer(checkpoint: str, layout: Layout, batch: Batch, process: ProcessInfo) -> MegatronTrain:
    """Make one rank, ready to train."""
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    tokens = int(batch.lengths_n.max()) + 1
    config = RLVRConfig.model_validate(
        {
            "exp_name": "benchmark",
            "pretrain": checkpoint,
            "rollout_batch_size": 1,
            "num_return_sequences_in_group": batch.num_samples,
            "prompt_length": tokens,
            "response_length": tokens,
            "actor_train": {
                "model_args": {"dtype": "fp32"},
                "router_replay": {"mode": "R3"},
                "data_args": {"file_name": "bundled:addition_mod10"},
                "device_mapping": list(range(layout.processes)),
                "use_sequence_packing": layout.packed,
                "training_args": {
                    "learning_rate": 1e-12,
                    "per_device_train_batch_size": batch.num_samples // MICRO_BATCHES,
                    "gradient_accumulation_steps": MICRO_BATCHES,
                },
                "strategy_args": {"strategy_config": layout.settings},
            },
            "actor_infer": {"router_replay": {"mode": "R3"}},
        }
    )
    strategy = MegatronTrain(model_role(config, "actor_train"), process)
    strategy.initialize()
    return strategy


def _run_rank(rank: int, layout: Layout, checkpoint: str, batch: Batch, rounds: int, port: int, folder: str) -> None:
    """Run steps of each kind alternately in one process; every other round is in reverse order."""
    torch.set_num_threads(1)
    process = ProcessInfo(rank, layout.processes, rank, "127.0.0.1", port)
    strategy = trainer(checkpoint, layout, batch, process)
    batches = {"R3": batch, "disable": replace(batch, routes=None)}
    replayed = strategy.compute_log_probs(batch).replay
    assert replayed is not None
    wall: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
    shares = []
    for number in range(rounds + 1):
        for arm in ARMS if number % 2 else reversed(ARMS):
            strategy.replay_mode = ARMS[arm]
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            result = strategy.train_step(batches[ARMS[arm]], number + 1)
            wall_taken, cpu_taken = time.perf_counter() - wall_start, time.process_time() - cpu_start
            if not number:  # it warms up
                continue
            wall[arm].append(wall_taken)
            cpu[arm].append(cpu_taken)
            if arm == "R3":
                shares.append(result.seconds_in_routes / wall_taken)
    strategy.close()
    agreement = replayed.agreed / replayed.compared
    report = {"wall": wall, "cpu": cpu, "share": shares, "agreement": agreement}
    (Path(folder) / str(rank)).write_text(json.dumps(report))
