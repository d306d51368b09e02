"""Audit in real schedules: it accepts a correct session, and names the first place of a difference in a wrong one."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Gang
from megatron_cases import FULL_RECOMPUTE, INTERLEAVED, LAYERS, TOP_K, Case, make_batch, shard

from roll_r3.batch.batch import Batch
from roll_r3.config.model_role import model_role
from roll_r3.errors import ReplayError
from roll_r3.replay.counts import ReplayCounts
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TWO_STAGES = {"pipeline_model_parallel_size": 2, **FULL_RECOMPUTE}
EXPERT_PARALLEL = {"expert_model_parallel_size": 2}
HOOKED = ("dispatch_preprocess", "dispatch_postprocess")


def _strategy(process: ProcessInfo, case: Case, **audit: Any) -> Any:
    from roll_r3.trainers.megatron.strategy import MegatronTrain

    config = case.config(process.world_size // case.model_parallel_size)
    actor = config.actor_train
    replay = actor.router_replay.model_copy(update={"audit": True, **audit})
    config = config.model_copy(update={"actor_train": actor.model_copy(update={"router_replay": replay})})
    strategy = MegatronTrain(model_role(config, "actor_train"), process)
    strategy.initialize()
    return strategy


def _dispatchers(strategy: Any) -> list[Any]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return [
        m.token_dispatcher
        for chunk in strategy.backend.model.chunks
        for m in chunk.modules()
        if isinstance(m, MoELayer)
    ]


def _at_rest(strategy: Any) -> bool:
    return not any(name in vars(dispatcher) for dispatcher in _dispatchers(strategy) for name in HOOKED)


@pytest.mark.parametrize(
    ("size", "layout", "mode", "packed", "passes"),
    [
        (1, FULL_RECOMPUTE, "R3", False, 2),
        (1, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "R3", True, 2),
        (1, {}, "R2", False, 1),
        (2, {**INTERLEAVED, **FULL_RECOMPUTE}, "R3", False, 2),
        (2, {**TWO_STAGES, "recompute_method": "block"}, "R2", True, 1.5),
        (2, {"tensor_model_parallel_size": 2, **FULL_RECOMPUTE}, "R3", False, 2),
        (2, EXPERT_PARALLEL, "R3", False, 1),
        (2, {**EXPERT_PARALLEL, **FULL_RECOMPUTE, "moe_token_dispatcher_type": "allgather"}, "R3", False, 2),
        (2, {"context_parallel_size": 2}, "R3", True, 1),
    ],
)
def test_every_token_went_where_its_row_says(
    size: int, layout: dict, mode: str, packed: bool, passes: float, gang: Gangs, tiny_moe: Path
) -> None:
    """Audit steps 1 and 3, two mini-batches each; rows unknown to the engine are left out."""
    batch = make_batch(unknown=0.3 if mode == "R3" else 0)
    case = Case(str(tiny_moe), layout, mode, packed, micro_batch_size=1, mini_batches=2)
    audited, at_rest = gang(size).run(_audited_steps, case, batch)[0]
    known = int(batch.lengths_n.sum()) if mode == "R2" else sum(int(r.known_R.sum()) for r in batch.routes)
    wanted = round(known * LAYERS * passes)
    assert [(c.audited, c.audit_equal) for c in audited] == [(wanted, wanted), (0, 0), (wanted, wanted)]
    assert at_rest


def _audited_steps(process: ProcessInfo, case: Case, batch: Batch) -> tuple[list[ReplayCounts], bool]:
    strategy = _strategy(process, case, audit_every=2)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    audited = []
    for step in (1, 2, 3):
        if case.mode == "R2":
            strategy.compute_log_probs(part)
        audited.append(strategy.train_step(part, step=step).replay)
    at_rest = _at_rest(strategy)
    strategy.close()
    return audited, at_rest


# Mistakes that the audit must find


def rolled(laid_out, axis):
    """Shift tokens or layers by one."""
    ids_LtK, known_t = laid_out
    return ids_LtK.roll(-1, axis), known_t


@contextmanager
def _mistake(name: str) -> Iterator[None]:
    from roll_r3.replay import rows
    from roll_r3.replay.layer import LayerReplay
    from roll_r3.replay.session import ReplaySession

    laid_out = ReplaySession._laid_out
    with pytest.MonkeyPatch.context() as patch:
        if name == "shifted by one token":
            patch.setattr(ReplaySession, "_laid_out", lambda *args: rolled(laid_out(*args), 1))
        elif name == "rows of the next layer":
            patch.setattr(ReplaySession, "_laid_out", lambda *args: rolled(laid_out(*args), 0))
        elif name == "other rows delivered":
            needed = rows._needed

            def one_earlier(tokens, offsets):
                runs = needed(tokens, offsets)
                return {sample: [(a - 1, b - 1) if a else (a, b) for a, b in r] for sample, r in runs.items()}

            patch.setattr(rows, "_needed", one_earlier)
        elif name == "newest first":
            patch.setattr(LayerReplay, "_recompute", lambda layer: layer.queue.pop())
        elif name == "the forward's own":

            def own_of_forward(layer):
                newest = layer.queue[-1]
                layer.queue = deque(list(layer.queue)[1:])
                return newest

            patch.setattr(LayerReplay, "_recompute", own_of_forward)
        elif name == "padding to one expert":
            patch.setattr(ReplaySession, "_padding_rows", lambda self, count: np.zeros((count, TOP_K), np.int64))
        yield


@pytest.mark.parametrize(
    ("mistake", "size", "layout", "said"),
    [
        ("shifted by one token", 1, FULL_RECOMPUTE, r"\(forward\)"),
        ("shifted by one token", 2, {"tensor_model_parallel_size": 2}, r"\(forward\)"),
        ("rows of the next layer", 1, {}, r"\(forward\)"),
        ("other rows delivered", 2, {"context_parallel_size": 2}, r"\(forward\)"),
        ("rows of the next layer", 2, EXPERT_PARALLEL, r"\(forward\)"),
        ("newest first", 2, TWO_STAGES, r"\(recomputed in backward\)"),
        ("the forward's own", 2, {**INTERLEAVED, **FULL_RECOMPUTE}, r"\(recomputed in backward\)"),
    ],
)
def test_a_wrong_row_is_named(mistake: str, size: int, layout: dict, said: str, gang: Gangs, tiny_moe: Path) -> None:
    batch = make_batch(length=12)
    answers = gang(size).run(_fails, mistake, Case(str(tiny_moe), layout), batch)
    messages = [message for message, _ in answers]
    assert len(set(messages)) == 1, "every rank raises, and says the same"
    print(messages[0])
    found = re.search(
        rf"layer (\d), sample sample(\d), position (\d+) {said}: recorded experts (\[.*?\]), used (\[.*?\])",
        messages[0],
    )
    assert found, messages[0]
    layer, sample, position = (int(found[i]) for i in (1, 2, 3))
    assert found[4] == str(sorted(batch.routes[sample].ids_MRK[layer, position].tolist()))
    assert found[5] != found[4]
    passes = 2 if "recompute_granularity" in layout else 1
    wrong, audited = (int(n) for n in re.search(r"(\d+) of (\d+) \(token, layer\) entries", messages[0]).groups())
    assert 0 < wrong <= audited == int(batch.lengths_n.sum()) * LAYERS * passes
    assert all(untouched for _, untouched in answers), "no weight learned from a wrong route"


def _fails(process: ProcessInfo, mistake: str, case: Case, batch: Batch) -> tuple[str, bool]:
    strategy = _strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    before = [p.clone() for chunk in strategy.backend.model.chunks for p in chunk.parameters()]
    with _mistake(mistake), pytest.raises(ReplayError, match="the audit of the dispatch found") as caught:
        strategy.train_step(part, step=1)
    after = [p for chunk in strategy.backend.model.chunks for p in chunk.parameters()]
    untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert _at_rest(strategy)
    good = strategy.train_step(part, step=1).replay
    assert good.audit_equal == good.audited > 0
    strategy.close()
    return str(caught.value), untouched


def test_other_faults_are_named_too(gang: Gangs, tiny_moe: Path) -> None:
    gang(1).run(_other_faults, Case(str(tiny_moe), FULL_RECOMPUTE), make_batch())
    gang(2).run(_lost_on_the_way, Case(str(tiny_moe), EXPERT_PARALLEL), make_batch())


def _other_faults(process: ProcessInfo, case: Case, batch: Batch) -> None:
    from roll_r3.trainers.megatron import schedule
    from roll_r3.trainers.megatron.audit import DispatchAudit

    strategy = _strategy(process, case)
    with _mistake("padding to one expert"), pytest.raises(ReplayError, match=r"no row, to 1 distinct experts instead"):
        strategy.train_step(batch, step=1)
    assert _at_rest(strategy)

    def third_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise ZeroDivisionError("in the third micro-batch")
        return original(*args)

    calls: list[Any] = []
    original = schedule._loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_loss", third_fails)
        with pytest.raises(ZeroDivisionError):
            strategy.train_step(batch, step=1)
    assert _at_rest(strategy)

    with pytest.MonkeyPatch.context() as patch:  # nothing is replayed, and no session complains
        patch.setattr("roll_r3.replay.session.LayerReplay.choose", _route_natively)
        patch.setattr("roll_r3.replay.session.ReplaySession.__exit__", _leave_unchecked)
        patch.setattr("roll_r3.trainers.megatron.routers.RoutedLayer.end_forward", lambda layer: None)
        with pytest.raises(ReplayError, match="entries sent to other experts than recorded"):
            strategy.train_step(batch, step=1)

    def overlook_layer_2(audit: DispatchAudit) -> DispatchAudit:
        enter(audit)
        for name in HOOKED:
            delattr(_dispatchers(strategy)[2], name)
        return audit

    enter = DispatchAudit.__enter__
    with pytest.MonkeyPatch.context() as patch:  # one layer hides its dispatch
        patch.setattr(DispatchAudit, "__enter__", overlook_layer_2)
        with pytest.raises(ReplayError, match="layer 2 dispatched 0 times instead of 8"):
            strategy.train_step(batch, step=1)
    strategy.close()


def _route_natively(layer: Any, scores_tE: torch.Tensor, topk: int, live: Callable[[], Any]) -> Any:
    return live()


def _leave_unchecked(session: Any, *error: Any) -> None:
    for router in session._all_routers():
        router.module.router_replay = None


def _lost_on_the_way(process: ProcessInfo, case: Case, batch: Batch) -> None:
    """Choose correctly, but give one expert a wrong number of tokens."""
    strategy = _strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    dispatcher = _dispatchers(strategy)[1]
    kind, original = type(dispatcher), type(dispatcher).dispatch_postprocess

    def miscounted(self: Any, *args: Any) -> Any:
        tokens, per_expert, probs = original(self, *args)
        if self is dispatcher and process.rank == 1:
            per_expert = per_expert.clone()
            per_expert[0] += per_expert[1]
            per_expert[1] = 0
        return tokens, per_expert, probs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "dispatch_postprocess", miscounted)
        with pytest.raises(ReplayError, match=r"found 0 of .*rank 1: layer 1: experts .* received"):
            strategy.train_step(part, step=1)
    assert _at_rest(strategy)
    strategy.close()


def test_a_row_left_from_a_log_prob_pass_is_found(gang: Gangs, tiny_moe: Path) -> None:
    """Let layers outlive their session, so that backward gets the rows of the previous pass."""
    gang(2).run(_stale_rows, Case(str(tiny_moe), TWO_STAGES, infer_batch_size=2), make_batch(length=12))


def _stale_rows(process: ProcessInfo, case: Case, batch: Batch) -> None:
    from roll_r3.replay.session import LayerReplay, ReplaySession

    survivors: dict[int, LayerReplay] = {}

    def surviving(session: ReplaySession, router: Any) -> LayerReplay:
        layer = survivors.setdefault(router.layer, LayerReplay(router.layer, session.stopwatch, recomputed=True))
        layer.consumed = 0
        return layer

    strategy = _strategy(process, case)
    backwards = batch.select(np.arange(batch.num_samples)[::-1])  # a pass in the same order would leave the right rows
    close = ReplaySession.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplaySession, "make_layer", surviving)
        patch.setattr(ReplaySession, "close", lambda session: None)
        strategy.compute_log_probs(backwards)
        with pytest.raises(ReplayError, match=r"recomputed in backward"):
            strategy.train_step(batch, step=1)
        survivors.clear()
        strategy.compute_log_probs(backwards)
        patch.setattr(ReplaySession, "close", close)  # the session's own check finds it too
        with pytest.raises(ReplayError, match="backward did not recompute the router of layer"):
            strategy.train_step(batch, step=1)
    strategy.close()
