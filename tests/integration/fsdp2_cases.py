"""Helpers of the FSDP2 trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Gang
from megatron_cases import (
    Case,
    open_strategy,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.strategies.base import ProcessInfo

Gangs = Callable[[int], Gang]

RECOMPUTE = {"recompute": True}

BUDGET = {"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 30}
"""Budget under which one of two ranks needs one more micro-batch; the other repeats one without counting it."""


def fsdp2(checkpoint: Path, **fields: Any) -> Case:
    return Case(str(checkpoint), engine="fsdp2", **fields)


def raw_gradients(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """Return this rank's part of the gradients under the optimizer's step."""
    strategy = open_strategy(process, case)
    part = shard(batch, process.rank, process.world_size)
    if case.mode == "R2":
        strategy.compute_log_probs(part)
    found = {}
    step = strategy.backend.optimizer.step

    def keep_then_step(norm: float) -> Any:
        for name, parameter in strategy.backend.model.module.named_parameters():
            assert parameter.grad.dtype is torch.float32
            found[name] = parameter.grad.to_local().numpy().copy()
        return step(norm)

    strategy.backend.optimizer.step = keep_then_step
    strategy.train_step(part, step=1)
    strategy.close()
    return found
