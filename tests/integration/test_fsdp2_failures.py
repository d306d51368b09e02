"""FSDP2: refused input, and the state after a refusal."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Gang, RankFailed
from fsdp2_cases import RECOMPUTE, Gangs, fsdp2
from megatron_cases import (
    Case,
    at_rest,
    exported,
    largest_difference,
    make_batch,
    open_strategy,
    run_case,
    shard,
)
from own_code import with_code_of_its_own
from safetensors.torch import load_file, save_file

from roll_r3.batch.batch import Batch
from roll_r3.errors import ConfigError, ReplayError, RollError
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers import world

pytestmark = pytest.mark.integration


def test_nothing_is_left_after_a_failure(gang: Gangs, tiny_moe: Path) -> None:
    batch, case = make_batch(), fsdp2(tiny_moe, layout=RECOMPUTE)
    (after,) = gang(1).run(_failures, case, batch)
    assert largest_difference(after, gang(1).run(run_case, case, batch)[0].weights) == 0


def _failures(process: ProcessInfo, case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """Return the weights of a good step after all failures."""
    from roll_r3.replay.session import ReplaySession
    from roll_r3.trainers import policy as module

    strategy = open_strategy(process, case)
    routers, objective, stage = strategy.backend.model.routers, module.policy_objective, ReplaySession.stage
    calls: list[Any] = []

    def fails(said: str, error: type[Exception] = ReplayError) -> None:
        with pytest.raises(error, match=said):
            strategy.train_step(batch, step=1)
        assert at_rest(strategy)

    def third_fails(*args: Any) -> Any:
        def computed(*pair: Any) -> Any:
            calls.append(pair)
            if len(calls) == 3:
                raise ZeroDivisionError("in the third micro-batch")
            return objective(*args)(*pair)

        return computed

    def skip_layer_2(session: Any, chunk: int, micro: Any) -> None:
        stage(session, chunk, micro)
        routers[2].detach()

    def two_rows_short(session: Any, chunk: int, micro: Any) -> None:
        stage(session, chunk, micro)
        for layer in session.layers[chunk]:
            layer.rows = replace(layer.rows, ids_tK=layer.rows.ids_tK[:-2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "policy_objective", third_fails)
        fails("in the third micro-batch", ZeroDivisionError)
    for wrong, said in ((skip_layer_2, "layer 2 did not consume its rows"), (two_rows_short, "but its rows are")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReplaySession, "stage", wrong)
            fails(said)
    with pytest.MonkeyPatch.context() as patch:  # rows are queued, but backward does not recompute
        for layer in strategy.backend.model.module.model.layers:
            patch.setattr(layer, "gradient_checkpointing", False)
        fails("backward did not recompute the router of layer 0")
    strategy.train_step(batch, step=1)
    assert at_rest(strategy)
    weights = dict(exported(strategy))
    with pytest.MonkeyPatch.context() as patch:  # backward recomputes, though nothing was queued
        for router in routers:
            patch.setattr(router, "recomputed", False)
        fails("the router of layer 3 ran outside a micro-batch")
    fails("a backward of this model failed", RollError)  # FSDP2 cannot continue after this, and gives no error
    strategy.close()
    return weights


def test_a_router_that_is_not_known_is_refused_by_its_class(gang: Gangs, tiny_moe: Path) -> None:
    with pytest.raises(
        RankFailed, match=r"layer 0 of Qwen3MoeForCausalLM must have one router of .*, got Qwen3MoeTopKRouter"
    ):
        gang(1).run(_unknown_router, fsdp2(tiny_moe))


def _unknown_router(process: ProcessInfo, case: Case) -> None:
    from roll_r3.models.hf import routers

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(routers.GATES, "Qwen3MoeTopKRouter")
        open_strategy(process, case)


@pytest.mark.parametrize("role", ["actor_train", "reference"])
def test_a_checkpoints_own_code_is_never_the_model(role: str, gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    ran = with_code_of_its_own(checkpoint)
    trusts = {"model_args": {"trust_remote_code": True, "dtype": "fp32"}} if role == "actor_train" else {}
    gang(1).run(_open_and_close, fsdp2(checkpoint, role=trusts, options={"use_kl_loss": True}), role)
    assert not ran.exists()


def _open_and_close(process: ProcessInfo, case: Case, role: str) -> None:
    open_strategy(process, case, role).close()


def test_a_world_that_is_left_takes_its_threads_with_it(tiny_moe: Path) -> None:
    gang = Gang(2)
    try:
        for _ in range(2):
            assert gang.run(_threads_left, fsdp2(tiny_moe), make_batch()) == [0, 0]
    finally:
        gang.close()


def _threads_left(process: ProcessInfo, case: Case, batch: Batch) -> int:
    strategy = open_strategy(process, case)
    strategy.train_step(shard(batch, process.rank, process.world_size), step=1)
    strategy.close()
    del strategy
    gc.collect()
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


@pytest.mark.parametrize("lost", ["model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight", "index"])
def test_weights_that_a_checkpoint_lacks_stop_every_rank(lost: str, gang: Gangs, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    if lost == "index":
        index = checkpoint / "model.safetensors.index.json"
        index.write_text("no JSON")
        wanted = f"the model was not built: rank 0: {index} cannot be read: JSONDecodeError"
    else:
        weights = load_file(checkpoint / "model.safetensors")
        del weights[lost]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        wanted = f"the model was not built: rank 0: {checkpoint} has no tensor {lost}, a part of"
    for said in gang(2).run(_not_built, fsdp2(checkpoint)):
        assert said.startswith(wanted), said


def _not_built(process: ProcessInfo, case: Case) -> str:
    with pytest.raises(ConfigError) as refused:
        open_strategy(process, case)
    world.leave()
    return str(refused.value)
