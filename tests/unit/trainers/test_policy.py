"""Order of a training step, over a backend with a list of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.data_parallel import DataParallel
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout
from roll_r3.config.model_role import ModelRole, model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sections import RolloutCorrectionConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers import policy as module
from roll_r3.trainers.cutting import CutRules
from roll_r3.trainers.policy import TrainPolicy
from roll_r3.trainers.update import StepFigures, mini_batches

VOCAB = 8


class Backend:
    """One rank whose logits are a table of one row for each token."""

    returns_results = True
    has_logits = True
    expert_parallel_size = 1
    device = torch.device("cpu")
    data_parallel = DataParallel(0, 1, torch.device("cpu"))
    data_parallel_rank, data_parallel_size = 0, 1
    cut_rules = CutRules(Layout())
    routers: Sequence[Any] = ()

    def __init__(self, role: ModelRole, process: ProcessInfo, *, trains: bool) -> None:
        assert trains
        self.calls: list[str] = []
        self.norm = 1.0
        self.table = torch.linspace(-1, 1, VOCAB * VOCAB).view(VOCAB, VOCAB).requires_grad_()

    def prepare_thread(self) -> None:
        self.calls.append("prepare_thread")

    def initialize(self, facts: Any) -> None:
        self.calls.append("initialize")

    def make_optimizer(self, learning: Any) -> None:
        self.optimizer = SimpleNamespace(zero_grad=self._zero_grad, grad_norm=self._grad_norm, step=self._step)

    def _zero_grad(self) -> None:
        self.calls.append("zero_grad")

    def _grad_norm(self) -> float:
        self.calls.append("grad_norm")
        return self.norm

    def _step(self, norm: float) -> StepFigures:
        self.calls.append("step")
        return StepFigures(norm, 0.5)

    def step_observers(self) -> list[Any]:
        self.calls.append("observe")
        return [SimpleNamespace(rewind=lambda: self.calls.append("rewind"))]

    def run(
        self, micro_batches: Sequence[MicroBatch], objective: Any, session: Any, *, forward_only: bool, **others: Any
    ) -> list[Any]:
        self.calls.append("run")
        with torch.set_grad_enabled(not forward_only):
            return [objective(m, self.table[m.tensor(m.batch.input_ids_N, 0, self.device)])[1] for m in micro_batches]

    def token_values(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, kept: Any, **asked: Any) -> Any:
        self.calls.append(f"temperature {asked['temperature']}")
        log_probs_BS = logits_BSV.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
        return log_probs_BS, torch.zeros_like(log_probs_BS)

    def sum_over_context_ranks(self, values: torch.Tensor) -> None:
        self.calls.append("sum")

    def reduced(self, stats: TokenStats) -> dict[str, float]:
        self.calls.append("reduced")
        return stats.reduce(self.data_parallel.reduce)

    def pieces(self, tensor: torch.Tensor) -> list[Any]:
        raise AssertionError("nothing is recorded")


class Policy(TrainPolicy):
    backend_class = Backend  # type: ignore[assignment]


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_facts", lambda path: SimpleNamespace(num_experts=4, moe_layers=(), top_k=1))

        def made(accumulation: int = 2) -> Any:
            strategy: Any = Policy(model_role(_config(accumulation), "actor_train"), ProcessInfo())
            strategy.initialize()
            strategy.backend.calls.clear()
            return strategy

        yield made
    dist.destroy_process_group()


def _config(accumulation: int) -> RLVRConfig:
    return RLVRConfig(
        exp_name="order",
        pretrain="/nowhere",
        rollout_batch_size=2,
        num_return_sequences_in_group=2,
        actor_infer={"generating_args": {"temperature": 0.5}, "device_mapping": [1]},
        actor_train={
            "data_args": {"file_name": "bundled:addition_mod10"},
            "training_args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation},
        },
    )


def _batch(**fields: Any) -> Batch:
    return Batch(
        sample_ids=("a", "b", "c", "d"),
        lengths_n=np.full(4, 3),
        input_ids_N=np.arange(12) % VOCAB,
        labels_N=np.arange(12)[::-1] % VOCAB,
        loss_mask_N=np.ones(12, bool),
        rollout_log_probs_N=np.full(12, -2, np.float32),
        advantages_N=np.linspace(-1, 1, 12).astype(np.float32),
        **fields,
    )


MICRO = ["temperature 0.5"] * 2


def test_an_optimizer_step_and_its_log_probabilities(make: Callable[..., Any]) -> None:
    strategy = make()
    result = strategy.train_step(_batch(), 1)
    before = ["prepare_thread", "zero_grad", "observe", "run", *MICRO]
    assert strategy.backend.calls == [*before, "grad_norm", "step", "sum", "reduced"]
    assert (result.metrics["actor_train/grad_norm"], result.metrics["actor/lr"]) == (1, 0.5)
    assert np.array_equal(result.log_probs_N, strategy.compute_log_probs(_batch()).log_probs_N)
    assert result.replay is None


def test_a_skipped_step_is_rewound_and_the_next_one_is_made(make: Callable[..., Any]) -> None:
    strategy = make()
    strategy.backend.norm = float("nan")
    result = strategy.train_step(_batch(), 1)
    assert strategy.backend.calls[-4:] == ["grad_norm", "rewind", "sum", "reduced"]
    assert result.metrics == {"actor_train/optimizer_steps": 0, "actor_train/skipped_steps": 1}
    assert result.skipped == ("step 1: the gradient norm is nan: optimizer step 1 was skipped",)
    strategy.backend.norm = 1.0
    assert strategy.train_step(_batch(), 2).metrics["actor_train/optimizer_steps"] == 1


def test_several_optimizer_steps_bring_no_log_probabilities(make: Callable[..., Any]) -> None:
    strategy = make(accumulation=1)
    result = strategy.train_step(_batch(old_log_probs_N=np.full(12, -2, np.float32)), 1)
    assert [call for call in strategy.backend.calls if call in ("run", "step", "sum")] == ["run", "step"] * 2
    assert (result.log_probs_N, result.metrics["actor_train/optimizer_steps"]) == (None, 2)


def test_an_optimizer_step_without_a_token_to_train_on_is_not_made(make: Callable[..., Any]) -> None:
    strategy = make(accumulation=1)
    old = np.full(12, -2, np.float32)
    (first, _) = mini_batches(strategy.learning, _batch(old_log_probs_N=old), seed=42, step=1, dp_rank=0)
    mask_N = np.repeat([name in first.sample_ids for name in "abcd"], 3)
    result = strategy.train_step(replace(_batch(old_log_probs_N=old), loss_mask_N=mask_N), 1)
    assert strategy.backend.calls.count("step") == result.metrics["actor_train/optimizer_steps"] == 1
    assert result.skipped == ()


def test_the_first_optimizer_step_made_is_compared_if_no_pass_came_before(make: Callable[..., Any]) -> None:
    strategy = make(accumulation=1)
    compared: list[tuple[int, bool]] = []

    def optimizer_step(*_: Any, number: int, compares: bool, **__: Any) -> tuple[list[Any], list[Any]]:
        compared.append((number, compares))
        return [], []

    old = np.full(12, -2, np.float32)
    (_, second) = mini_batches(strategy.learning, _batch(old_log_probs_N=old), seed=42, step=1, dp_rank=0)
    mask_N = np.repeat([name in second.sample_ids for name in "abcd"], 3)
    correction = RolloutCorrectionConfig(bypass=True)
    algorithm = replace(strategy.learning.algorithm, rollout_correction=correction)
    strategy.role = replace(strategy.role, learning=replace(strategy.learning, algorithm=algorithm))
    strategy._optimizer_step = optimizer_step
    strategy.train_step(replace(_batch(old_log_probs_N=old), loss_mask_N=mask_N), 1)
    strategy.train_step(_batch(old_log_probs_N=old), 1)
    assert compared == [(2, True), (1, True), (2, False)]


def test_a_world_needs_one_rank_for_each_device() -> None:
    with pytest.raises(ConfigError, match="device_mapping names 1 devices, but the world has 2 ranks"):
        Policy(model_role(_config(2), "actor_train"), ProcessInfo(world_size=2))
