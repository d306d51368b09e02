"""`fp32_lm_head`: logits of a bf16 model in fp32 on both trainers, and the gradients of the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import Gang
from megatron_cases import (
    Case,
    Reference,
    gradients,
    largest_difference,
    make_batch,
    open_strategy,
    read_weights,
    run_case,
    shard,
)

from roll_r3.batch.batch import Batch
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

HEAD = {"fp32_lm_head": True}
TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tied"), seed=1, tie_word_embeddings=True)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("engine", "size", "layout"), [("fsdp2", 2, {}), ("megatron", 2, TP2)])
def test_logits_of_a_bf16_model_are_not_rounded(
    engine: str, size: int, layout: dict[str, Any], tie: bool, gang: Gangs, tiny_moe: Path, tied: Path
) -> None:
    """Compare logits with the exact product of hidden states and weight, and the weight's gradient with the exact one.

    Logits are equal within fp32, the gradient within a rounding to bf16.
    """
    micro = 4 if engine == "fsdp2" else 8
    case = Case(str(tied if tie else tiny_moe), layout, "disable", True, "bf16", micro, engine=engine, options=HEAD)
    for found in gang(size).run(_around_the_head, case, make_batch()):
        assert found["dtype"] == torch.float32
        assert found["logits"] < 1e-5 < found["rounded"]
        assert tie or found["gradient"] < 2**-8


def _around_the_head(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, Any]:
    """Return the logits' distance from the exact product, as they are and rounded, and the gradient's relative one."""
    strategy = open_strategy(process, case)
    model = strategy.backend.model.module if case.engine == "fsdp2" else unwrapped(strategy.backend.model.chunks[-1])
    layer = model.lm_head if case.engine == "fsdp2" else model.output_layer
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        seen.update(hidden=inputs[0].detach().double(), logits=logits.detach())
        logits.register_hook(lambda grad: seen.update(grad=grad.detach().double()))

    layer.register_forward_hook(keep)
    # a tied layer of megatron has no weight of its own
    weight = layer.weight if layer.weight is not None else model.shared_embedding_or_output_weight()
    sharded = case.engine == "fsdp2"
    weight_VH = (weight.full_tensor().bfloat16() if sharded else weight).detach().double()
    step = strategy.backend.optimizer.step

    def gradient_then_step(norm: float) -> Any:
        seen["weight_grad"] = weight.grad.full_tensor() if sharded else weight.main_grad.clone()
        return step(norm)

    strategy.backend.optimizer.step = gradient_then_step
    strategy.train_step(shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size), step=1)
    hidden, grad = seen["hidden"], seen["grad"]
    if case.engine == "megatron":  # sequence parallelism: a rank has its part of the tokens, and of the vocabulary
        parts = [torch.empty_like(hidden) for _ in range(process.world_size)]
        dist.all_gather(parts, hidden)
        hidden = torch.cat(parts)
    exact = hidden @ weight_VH.T
    wanted = grad.flatten(0, -2).T @ hidden.flatten(0, -2)
    if case.engine == "fsdp2":
        dist.all_reduce(wanted)
    found = {
        "dtype": seen["logits"].dtype,
        "logits": float((seen["logits"] - exact).abs().max()),
        "rounded": float((exact.bfloat16() - exact).abs().max()),
        "gradient": float((seen["weight_grad"] - wanted).norm() / wanted.norm()),
    }
    strategy.close()
    return found


def unwrapped(chunk: Any) -> Any:
    from roll_r3.trainers.megatron.bridge import unwrap

    return unwrap(chunk)


@pytest.mark.parametrize(
    ("engine", "layout", "tie"),
    [
        ("fsdp2", {}, True),
        ("megatron", TP2, True),
        ("megatron", {"pipeline_model_parallel_size": 2}, False),
    ],
)
def test_every_weight_has_its_gradient(
    engine: str, layout: dict[str, Any], tie: bool, gang: Gangs, tiny_moe: Path, tied: Path
) -> None:
    """Run in fp32, where the setting changes no number."""
    checkpoint, batch = tied if tie else tiny_moe, make_batch()
    case = Case(str(checkpoint), layout, engine=engine, options=HEAD)
    outcome = gang(2).run(run_case, case, batch)[0]
    wanted = Reference(str(checkpoint)).gradients(batch, case.config(2 // case.model_parallel_size))
    assert largest_difference(gradients(read_weights(checkpoint), outcome.weights), wanted) < 1e-6


def test_the_reference_has_the_same_head(gang: Gangs, tiny_moe: Path) -> None:
    """Check that a frozen copy of a bf16 policy gives the policy's log-probabilities to the bit."""
    for engine in ("fsdp2", "megatron"):
        case = Case(str(tiny_moe), mode="disable", dtype="bf16", engine=engine, options=HEAD | {"use_kl_loss": True})
        actor, frozen = (gang(1).run(_log_probs, case, make_batch(), role)[0] for role in ("actor_train", "reference"))
        assert np.array_equal(actor, frozen)
        plain = replace(case, options={"use_kl_loss": True})
        assert np.abs(gang(1).run(_log_probs, plain, make_batch(), "reference")[0] - frozen).max() > 1e-3


def _log_probs(process: ProcessInfo, case: Case, batch: Batch, role: str) -> np.ndarray:
    strategy = open_strategy(process, case, role)
    found: np.ndarray = strategy.compute_log_probs(batch).log_probs_N
    strategy.close()
    return found
