"""FSDP2: checkpoints to resume from."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_cases import RECOMPUTE, Gangs, fsdp2
from megatron_cases import (
    Case,
    exported,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    shard,
    written_while_it_trains,
)
from torch.distributed.tensor import DTensor

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


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_training_goes_on_from_a_checkpoint(name: str, gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    """Resume on the same number of ranks to the bit; on another number, up to the order of sums."""
    case = fsdp2(models[name], layout=RECOMPUTE, training=MOMENTUM)
    batch = make_batch(checkpoint=models[name])
    path = tmp_path / "saved" / "step2"

    whole = gang(2).run(_two_steps_saved_and_one_more, case, batch, path)
    again = gang(2).run(_one_more_step, case, batch, path)
    (alone,) = gang(1).run(_one_more_step, replace(case, micro_batch_size=4), batch, path)

    assert [wanted[2] for wanted in whole] == [found[2] for found in again], "parts of each rank, to the bit"
    assert whole[0][0] == again[0][0] == alone[0] > 0, "learning rate"
    assert largest_difference(whole[0][1], again[0][1]) == 0
    difference = largest_difference(whole[0][1], alone[1])
    print(f"{name}: one rank off by {difference:.1e}")
    assert difference < 1e-6
    assert largest_difference(whole[0][1], read_weights(models[name])) > 1e-3
    files = sorted(file.name for file in path.iterdir())
    assert files == [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert sorted(folder.name for folder in path.parent.iterdir()) == ["after", "beside", "step2"]


def _step_of(strategy: Any, process: ProcessInfo, batch: Batch, step: int) -> tuple[float, Any, Any]:
    """Return learning rate, exported weights, and digests of this rank's parts after a step."""
    metrics = strategy.train_step(shard(batch, process.rank, process.world_size), step=step).metrics
    digests = {
        name: sha256((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numpy().tobytes()).hexdigest()
        for name, tensor in strategy.backend.state().items()
    }
    return metrics["actor/lr"], dict(exported(strategy)), digests


def _two_steps_saved_and_one_more(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    for name, buffer in strategy.backend.model.module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(1.0)  # differs from the model's own checkpoint
    for step in (1, 2):
        _step_of(strategy, process, batch, step)
    found = written_while_it_trains(strategy, path, lambda: _step_of(strategy, process, batch, 3))
    with pytest.raises(RollError, match="step2 already exists: a checkpoint never overwrites another"):
        strategy.snapshot().write(path)
    strategy.close()
    return found


def _one_more_step(process: ProcessInfo, case: Case, batch: Batch, path: Path) -> tuple[Any, ...]:
    strategy = open_strategy(process, case)
    strategy.load_checkpoint(path)
    found = _step_of(strategy, process, batch, 3)
    strategy.close()
    return found


def test_a_checkpoint_that_cannot_be_loaded_says_so(gang: Gangs, models: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "qwen3"
    gang(2).run(_save, fsdp2(models["qwen3_moe"]), saved)
    said = gang(2).run(_refused_checkpoint, fsdp2(models["mixtral"]), saved)
    assert all("is not a checkpoint of this model: rank 0: it has model." in text for text in said)
    for number in (1, 2):
        part = saved / f"shard-0000{number}-model-00001-of-00001.safetensors"
        part.rename(tmp_path / part.name)
        said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), saved)
        assert all("it is incomplete: a file" in text or "has shape" in text for text in said)
        part.write_bytes((tmp_path / part.name).read_bytes()[:-1000])
        said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), saved)
        assert all("this model: rank 0: SafetensorError" in text for text in said)
        (tmp_path / part.name).rename(part)
    said = gang(2).run(_refused_checkpoint, fsdp2(models["qwen3_moe"]), tmp_path / "nowhere")
    assert all(
        "nowhere is not a checkpoint of this model: rank 0: the directory does not exist" in text for text in said
    )


@pytest.mark.parametrize("change", ["one more", "one less", "another shape", "unreadable on one rank"])
def test_a_checkpoint_of_another_model_is_not_written_into_this_one(
    change: str, gang: Gangs, tiny_moe: Path, tmp_path: Path
) -> None:
    """Change one tensor. Every rank reports it, even if only one rank met the error."""
    first, second = gang(2).run(_changed_checkpoint, fsdp2(tiny_moe), tmp_path / "saved", change)
    assert first == second
    said = {
        "one more": r"rank 0: it has model\.other, unknown to this model",
        "one less": r"rank 0: it has no model\.model\.norm\.weight",
        "another shape": r"rank 0: model\.model\.norm\.weight has shape \[5\], but \[64\] in this model",
        "unreadable on one rank": r"this model: rank 1: OSError: stale file handle$",
    }
    assert re.search(said[change], first), first


def _changed_checkpoint(process: ProcessInfo, case: Case, path: Path, change: str) -> str:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from roll_r3.trainers import checkpoint

    strategy = open_strategy(process, case)
    saved, name = strategy.backend.state(), "model.model.norm.weight"
    if change == "one more":
        saved["model.other"] = torch.ones(3)
    elif change == "one less":
        del saved[name]
    elif change == "another shape":
        saved[name] = torch.ones(5)
    checkpoint.Snapshot(saved).write(path)
    with torch.no_grad():
        for tensor in strategy.backend.state().values():
            tensor.fill_(7)
    with pytest.MonkeyPatch.context() as patch:
        if change == "unreadable on one rank" and process.rank == 1:

            def unreadable(reader: Any) -> None:
                raise OSError("stale file handle")

            patch.setattr(HuggingFaceStorageReader, "read_metadata", unreadable)
        with pytest.raises(ConfigError) as refused:
            strategy.load_checkpoint(path)
    # each call makes another tensor of the number of steps
    kept = {n: t for n, t in strategy.backend.state().items() if n != "optimizer.done"}
    assert all(((t.to_local() if isinstance(t, DTensor) else t) == 7).all() for t in kept.values())
    strategy.close()
    return str(refused.value)


def test_a_checkpoint_that_cannot_be_written_says_so_on_every_rank(gang: Gangs, tiny_moe: Path, tmp_path: Path) -> None:
    """Fail in two tasks of rank 0 alone: making the directory, and giving it its name."""
    (tmp_path / "file").touch()
    for said in gang(2).run(_unwritten, fsdp2(tiny_moe), tmp_path):
        assert re.search(r"checkpoint .*/file/saved was not written: rank 0: NotADirectoryError: ", said[0]), said[0]
        assert re.search(r"checkpoint .*/saved was not written: rank 0: OSError: no space$", said[1]), said[1]
    assert not (tmp_path / "saved").exists()


def _unwritten(process: ProcessInfo, case: Case, path: Path) -> list[str]:
    from roll_r3.trainers import checkpoint

    strategy = open_strategy(process, case)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(RollError) as refused:
            strategy.snapshot().write(path / "file" / "saved")
        found.append(str(refused.value))

        def no_space(*names: Path) -> None:
            raise OSError("no space")

        patch.setattr(checkpoint.os, "rename", no_space)
        with pytest.raises(RollError) as refused:
            strategy.snapshot().write(path / "saved")
        found.append(str(refused.value))
    strategy.close()
    return found


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
