"""A replaying actor and a natively routing reference in one process do not influence each other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Gang
from megatron_cases import FULL_RECOMPUTE, LAYERS, Case, make_batch

from roll_r3.batch.batch import Batch
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration


def test_the_reference_routes_by_itself_inside_the_actors_session(gang: Callable[[int], Gang], tiny_moe: Path) -> None:
    gang(1).run(_both, Case(str(tiny_moe), FULL_RECOMPUTE, options={"use_kl_loss": True}), make_batch())


def _both(process: ProcessInfo, case: Case, batch: Batch) -> None:
    from roll_r3.trainers import policy as module
    from roll_r3.trainers.megatron.strategy import MegatronInfer, MegatronTrain

    actor = MegatronTrain(case.view(), process)
    reference = MegatronInfer(case.view(name="reference"), process)
    actor.initialize()
    reference.initialize()
    # the first strategy must have made megatron importable here
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay

    routers = [m for chunk in reference.backend.model.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
    assert len(routers) == LAYERS

    def log_probs(with_batch: Batch) -> Any:
        assert all(router.router_replay is None for router in routers)
        found = reference.compute_log_probs(with_batch).log_probs_N
        assert all(router.router_replay is None for router in routers)
        assert RouterReplay.global_router_replay_instances == []
        return found

    alone = log_probs(batch)
    inside = []
    objective = module.policy_objective

    def asks_the_reference(*args: Any) -> Any:
        compute = objective(*args)

        def computed(micro: Any, logits: Any) -> Any:
            held = [router.module.router_replay for router in actor.backend.model.routers[0]]
            assert None not in held, "the actor's session is open"
            inside.append(log_probs(batch))
            return compute(micro, logits)

        return computed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "policy_objective", asks_the_reference)
        actor.train_step(batch, step=1)
    assert len(inside) == 4
    assert all(np.array_equal(alone, found) for found in inside)
    assert np.array_equal(alone, log_probs(replace(batch, routes=None)))
    assert not np.array_equal(alone, actor.compute_log_probs(batch).log_probs_N)
    reference.close()
    actor.close()


LAYOUT = {"context_parallel_size": 2, "use_distributed_optimizer": True, **FULL_RECOMPUTE}


def test_a_world_that_is_left_takes_its_threads_with_it(tiny_moe: Path) -> None:
    """Check closed worlds for threads: they would slow down all later tests in the same process."""
    gang = Gang(2)
    try:
        for _ in range(2):
            assert gang.run(_threads_left, Case(str(tiny_moe), LAYOUT), make_batch()) == [0, 0]
    finally:
        gang.close()


def _threads_left(process: ProcessInfo, case: Case, batch: Batch) -> int:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    actor = MegatronTrain(case.view(), process)
    actor.initialize()
    actor.train_step(batch, step=1)
    actor.close()
    del actor  # the optimizer holds groups
    gc.collect()
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)
