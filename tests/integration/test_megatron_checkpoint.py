"""Megatron: checkpoints to resume from, in the same layout and in others."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_cases import (
    FULL_RECOMPUTE,
    INTERLEAVED,
    Case,
    exported,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    shard,
    written_while_it_trains,
)

from roll_r3.batch.batch import Batch
from roll_r3.errors import ConfigError, RollError
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration

MOMENTUM = {
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_epsilon": 1e-3,
}
"""Step dependent on Adam's moments and the number of previous steps, without amplified rounding."""

DISTRIBUTED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


def case_of(checkpoint: Path, layout: dict[str, Any], **changes: Any) -> Case:
    """Return a case with micro-batches of one size in every layout: sums differ only in their order."""
    return Case(str(checkpoint), layout=layout, training=MOMENTUM, **{"micro_batch_size": 2, **changes})


SAME = {
    "qwen3_moe, tensor, expert": ("qwen3_moe", {**TP2, **EP2}, {}),
    "qwen3_moe, interleaved": ("qwen3_moe", {**INTERLEAVED, **FULL_RECOMPUTE}, {}),
    "qwen3_moe, distributed optimizer": ("qwen3_moe", {**DISTRIBUTED, **EP2}, {}),
    "qwen3_moe, bf16": ("qwen3_moe", EP2, {"dtype": "bf16"}),
    "qwen3_moe, bf16, distributed optimizer": ("qwen3_moe", {**DISTRIBUTED, **CP2}, {"dtype": "bf16"}),
    "olmoe, norms over all heads": ("olmoe", TP2, {}),
    "deepseek_v3, a bias that moves": ("deepseek_v3", {**TP2, "moe_router_bias_update_rate": 0.01}, {}),
}


@pytest.mark.parametrize("name", SAME)
def test_training_goes_on_to_the_bit(name: str, gang: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """Compare the step after a checkpoint with the one of an unbroken run, and all inputs of the next step."""
    model, layout, changes = SAME[name]
    case, batch = case_of(models[model], layout, **changes), make_batch(checkpoint=models[model])
    path = tmp_path / "saved" / "step2"
    whole = gang(2).run(_two_steps_saved_and_one_more, case, batch, path)
    again = gang(2).run(_one_more_step, case, batch, path)
    assert whole[0].keys() == again[0].keys()
    for wanted, found in zip(whole, again, strict=True):
        assert wanted["memory"] == found["memory"], "weights, masters, moments and buffers of each rank"
        assert len(wanted["memory"]) > 100
    assert whole[0]["metrics"] == again[0]["metrics"]
    assert whole[0]["metrics"]["actor/lr"] > 0
    assert largest_difference(whole[0]["weights"], again[0]["weights"]) == 0
    assert largest_difference(whole[0]["weights"], read_weights(models[model])) > 1e-3
    assert sorted(folder.name for folder in path.parent.iterdir()) == ["after", "beside", "step2"]


OTHERS = {
    "tensor-expert to pipeline": ({**TP2, **EP2}, INTERLEAVED),
    "pipeline to distributed optimizer": (PP2, {**DISTRIBUTED, **EP2}),
    "distributed optimizer to tensor": ({**DISTRIBUTED, **EP2}, TP2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_training_goes_on_in_another_layout(name: str, gang: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """Resume on two ranks and on one, equal up to the order of sums."""
    first, second = (case_of(models["qwen3_moe"], layout) for layout in OTHERS[name])
    batch = make_batch(checkpoint=models["qwen3_moe"])
    path = tmp_path / "step2"
    whole = gang(2).run(_two_steps_saved_and_one_more, first, batch, path)
    again = gang(2).run(_one_more_step, second, batch, path)
    (alone,) = gang(1).run(_one_more_step, replace(first, layout={}, micro_batch_size=4), batch, path)
    for found in (again[0], alone):
        difference = largest_difference(whole[0]["weights"], found["weights"])
        print(f"{name}: off by {difference:.1e}")
        assert difference < 1e-6
        assert found["metrics"]["actor/lr"] == whole[0]["metrics"]["actor/lr"]


def test_a_vocabulary_that_fills_up_to_the_ranks_is_saved_without_what_fills_it(
    gang: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Use 261 words: 262 rows on two ranks, 261 on one."""
    from megatron_cases import make_model

    checkpoint = make_model(tmp_path_factory.mktemp("odd"), "qwen3_moe", vocab_size=261)
    case, batch = case_of(checkpoint, TP2), make_batch(checkpoint=checkpoint)
    whole = gang(2).run(_two_steps_saved_and_one_more, case, batch, tmp_path / "step2")
    (alone,) = gang(1).run(_one_more_step, replace(case, layout={}, micro_batch_size=4), batch, tmp_path / "step2")
    assert largest_difference(whole[0]["weights"], alone["weights"]) < 1e-6


def test_weights_alone_are_read_into_a_model_that_does_not_train(
    gang: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    case = case_of(models["deepseek_v3"], TP2, dtype="bf16")
    batch = make_batch(checkpoint=models["deepseek_v3"])
    saved = gang(2).run(_two_steps_saved_and_one_more, case, batch, tmp_path / "step2")
    (found,) = gang(1).run(_weights_alone, replace(case, layout={}, micro_batch_size=4), tmp_path / "step2")
    assert largest_difference(saved[0]["saved weights"], found) == 0


def _weights_alone(process: ProcessInfo, case: Case, path: Path) -> dict[str, Any]:
    from roll_r3.trainers.megatron.strategy import MegatronInfer

    strategy = MegatronInfer(case.view(), process)
    strategy.initialize()
    strategy.load_weights(path)
    weights = dict(exported(strategy))
    strategy.close()
    return weights


def test_a_checkpoint_that_cannot_be_loaded_says_so(gang: Any, models: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "qwen3"
    case = case_of(models["qwen3_moe"], PP2)
    gang(2).run(_save, case, saved)
    said = gang(2).run(_refused_checkpoint, case_of(models["mixtral"], PP2), saved)
    assert all("is not a checkpoint of this model: rank 0: it has model." in text for text in said)
    for number in (1, 2):
        part = saved / f"shard-0000{number}-model-00001-of-00001.safetensors"
        part.rename(tmp_path / part.name)
        said = gang(2).run(_refused_checkpoint, case, saved)
        assert all(("it is incomplete: a file" in text) or ("it has no " in text) for text in said)
        part.write_bytes((tmp_path / part.name).read_bytes()[:-1000])
        said = gang(2).run(_refused_checkpoint, case, saved)
        assert all("this model: rank 0: SafetensorError" in text for text in said)
        (tmp_path / part.name).rename(part)
    said = gang(2).run(_refused_checkpoint, case, tmp_path / "nowhere")
    assert all(
        "nowhere is not a checkpoint of this model: rank 0: the directory does not exist" in text for text in said
    )


def test_a_checkpoint_that_cannot_be_written_says_so_on_every_rank(
    gang: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """Limit the size of one rank's files, as on a full disk."""
    for said in gang(2).run(_unwritten, case_of(models["qwen3_moe"], PP2), tmp_path / "saved"):
        assert re.search(r"checkpoint .*/saved was not written: rank 1: .*File too large", said), said
    assert not (tmp_path / "saved").exists()


def _unwritten(process: ProcessInfo, case: Case, path: Path) -> str:
    strategy = open_strategy(process, case)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if process.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RollError) as refused:
            strategy.snapshot().write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    strategy.close()
    return str(refused.value)


def _step_of(strategy: Any, batch: Batch, step: int) -> dict[str, float]:
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    return dict(strategy.train_step(part, step=step).metrics)


def _outcome(strategy: Any, metrics: dict[str, float]) -> dict[str, Any]:
    return {"metrics": metrics, "weights": dict(exported(strategy)), "memory": _memory(strategy)}


def _memory(strategy: Any) -> dict[str, str]:
    """Return digests of this rank's inputs of the next step."""
    tensors = {
        f"{number} {name}": tensor
        for number, chunk in enumerate(strategy.backend.model.chunks)
        for name, tensor in chunk.state_dict(keep_vars=True).items()
        if tensor is not None
    }
    for number, slot in enumerate(strategy.backend.optimizer.slots()):
        if slot.main is not None:
            tensors |= {f"slot {number} main": slot.main, f"slot {number} step": slot.state["step"]}
            tensors |= {f"slot {number} {moment}": slot.state[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return {
        name: sha256(tensor.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        if tensor.ndim
        else str(float(tensor))
        for name, tensor in tensors.items()
    }


def _two_steps_saved_and_one_more(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> dict[str, Any]:
    strategy = open_strategy(process, case)
    for step in (1, 2):
        _step_of(strategy, batch, step)
    saved = dict(exported(strategy))
    metrics = written_while_it_trains(strategy, path, lambda: _step_of(strategy, batch, 3))
    with pytest.raises(RollError, match="step2 already exists: a checkpoint never overwrites another"):
        strategy.snapshot().write(path)
    outcome = _outcome(strategy, metrics)
    strategy.close()
    return outcome | {"saved weights": saved}


def _one_more_step(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> dict[str, Any]:
    strategy = open_strategy(process, case)
    strategy.load_checkpoint(path)
    outcome = _outcome(strategy, _step_of(strategy, batch, 3))
    strategy.close()
    return outcome | {"saved weights": None}


def _save(process: ProcessInfo, case: Case, path: Path) -> None:
    strategy = open_strategy(process, case)
    strategy.snapshot().write(path)
    strategy.close()


def _refused_checkpoint(process: ProcessInfo, case: Case, path: Path) -> str:
    strategy = open_strategy(process, case)
    with pytest.raises(ConfigError) as refused:
        strategy.load_checkpoint(path)
    strategy.close()
    return str(refused.value)
