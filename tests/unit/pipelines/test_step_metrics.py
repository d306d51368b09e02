"""Figures of a step against numbers worked out by hand; every name is declared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from roll_r3.algorithms.advantages import TokenAdvantages
from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.models import BatchLogProbs, BatchUpdate
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sections import RolloutCorrectionConfig
from roll_r3.pipelines.step_metrics import StepRecord, step_metrics
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.expert_load import ExpertLoad
from roll_r3.tracking.names import declared_order


def trajectory(name: str, prompt: int, log_probs: list[float], finish: str) -> Trajectory:
    rows = prompt + len(log_probs) - 1
    return Trajectory.one_turn(
        name,
        "a",
        prompt_ids=range(prompt),
        response_ids=range(len(log_probs)),
        log_probs=log_probs,
        version=0,
        finish_reason=finish,  # type: ignore[arg-type]
        routes=RoutedExperts(np.zeros((3, rows, 2), np.uint8)),
    )


CONFIG = RLVRConfig(exp_name="x", pretrain="p", actor_train={}, actor_infer={})


@pytest.fixture
def record() -> StepRecord:
    trajectories = [trajectory("a", 3, [-1.0, -2.0], "stop"), trajectory("b", 2, [-0.5], "length")]
    batch = Batch.from_trajectories(trajectories).filled_up(3)
    mask = batch.loss_mask_N
    # the trainer gives 0.1 less for every sampled token; fillers hold nonsense that must not count
    old = np.where(mask, batch.rollout_log_probs_N - 0.1, -99).astype(np.float32)
    batch = replace(batch, old_log_probs_N=old, advantages_N=np.where(mask, 2.0, 0.0).astype(np.float32))
    counts = ReplayCounts(trainable=9, trainable_replayed=9, missing=0, padded=6, compared=20, agreed=15)
    return StepRecord(
        step=4,
        seconds={"time/step_total": 2.0, "time/step_generate": 1.0},
        trajectories=trajectories,
        groups=["a", "a"],
        scores=np.array([1.0, 0.0]),
        advantages=TokenAdvantages(batch.advantages_N, np.array([0.9, -0.7]), None, None, {}),
        batch=batch,
        old=BatchLogProbs(old, np.where(mask, 0.3, 99).astype(np.float32), counts, 0.1),
        update=BatchUpdate({"actor/lr": 1e-3}, counts, 0.3),
        dropped=1,
        failed_rewards=3,
        undecided_rewards=4,
        retries=2,
        engine_restarts=1,
        samples_seen=8,
    )


def test_figures(record):
    m = step_metrics(CONFIG, record)
    assert declared_order(m)[1] == []
    assert m["critic/score/mean"] == 0.5
    assert m["critic/rewards/max"] == 0.9
    assert m["tokens/response_length/max"] == 2
    assert m["tokens/truncated_ratio"] == 0.5
    assert (m["reward/failed"], m["reward/undecided"]) == (3, 4)
    assert m["system/tps"] == 4.0, "8 tokens in 2 s"
    assert m["actor/rollout_train_logprobs_abs_diff_mean"] == pytest.approx(0.1, rel=1e-5)
    assert m["critic/entropy/mean"] == pytest.approx(0.3)
    assert m["critic/advantages/min"] == 2.0
    assert m["router_replay/coverage"] == 1.0
    assert m["router_replay/agreement_native"] == 0.75
    assert m["router_replay/bytes_per_token"] == 6, "3 MoE layers x top-2 x 1 byte"
    assert m["router_replay/time_share"] == pytest.approx(0.2)
    assert not [name for name in m if name.startswith("critic/kl")]


@pytest.mark.parametrize(
    ("engine", "top_k", "mask", "given"),
    [("vllm", 50, False, False), ("vllm", -1, False, True), ("vllm", 50, "auto", True), ("sglang", 50, False, True)],
)
def test_figures_that_compare_with_the_rollout_are_left_out_where_its_log_probs_are_others(
    record, engine, top_k, mask, given
):
    infer = {
        "strategy_args": {"strategy_name": engine},
        "generating_args": {"temperature": 0.8, "top_k": top_k, "sampling_mask": mask},
    }
    m = step_metrics(RLVRConfig(exp_name="x", pretrain="p", actor_train={}, actor_infer=infer), record)
    compared = [name for name in m if name.startswith(("rollout_corr/", "training/", "actor/rollout_train"))]
    assert len(compared) == (12 if given else 0)
    batch = record.batch
    masses = np.exp(batch.old_log_probs_N - batch.rollout_log_probs_N)[batch.loss_mask_N]
    assert m.get("sampling_mask/mass") == (None if given else pytest.approx(masses.mean(), rel=1e-6))


def test_filtered_tokens_stay_in_the_comparison_with_the_rollout(record):
    whole = step_metrics(CONFIG, record)
    none = replace(record.batch, loss_mask_N=np.zeros_like(record.batch.loss_mask_N))
    m = step_metrics(CONFIG, replace(record, batch=none))
    for name in ("rollout_corr/kl", "rollout_corr/ess", "training/rollout_probs_diff_max"):
        assert m[name] == whole[name]
    assert all(np.isfinite(value) for value in m.values())


def test_bypass_has_nothing_to_compare(record):
    m = step_metrics(CONFIG.model_copy(update={"rollout_correction": RolloutCorrectionConfig(bypass=True)}), record)
    assert not [name for name in m if name.startswith(("rollout_corr/", "training/", "actor/rollout_train"))]


def test_the_reference_adds_its_figures(record):
    ref = (record.batch.old_log_probs_N + 0.5).astype(np.float32)
    m = step_metrics(CONFIG, replace(record, batch=replace(record.batch, ref_log_probs_N=ref)))
    assert m["critic/kl"] == pytest.approx(np.exp(0.5) - 1 - 0.5, rel=1e-4)
    assert m["critic/kl_clamped"] == 0
    far = np.where(np.cumsum(record.batch.loss_mask_N) == 1, ref + 3, ref).astype(np.float32)
    m = step_metrics(CONFIG, replace(record, batch=replace(record.batch, ref_log_probs_N=far)))
    assert m["critic/kl_clamped"] == pytest.approx(1 / 3)
    assert declared_order(m)[1] == []


def test_the_penalty_adds_its_figures(record):
    taken = replace(record.advantages, penalty_n=np.array([0.1, 0.3]), penalty_clamped=0.25)
    m = step_metrics(CONFIG, replace(record, advantages=taken))
    assert m["critic/kl_penalty"] == pytest.approx(0.2)
    assert m["critic/kl_penalty_clamped"] == 0.25
    assert m["critic/rewards/min"] == -0.7
    assert declared_order(m)[1] == []


def test_without_replay_there_are_no_replay_figures(record):
    plain = replace(record, old=replace(record.old, replay=None), update=replace(record.update, replay=None))
    assert not [name for name in step_metrics(CONFIG, plain) if name.startswith("router_replay/")]


def test_r2_reports_coverage_without_an_agreement(record):
    update = replace(record.update, replay=replace(record.update.replay, compared=0))
    m = step_metrics(CONFIG, replace(record, old=replace(record.old, replay=None), update=update))
    assert m["router_replay/coverage"] == 1.0
    assert "router_replay/agreement_native" not in m


def test_without_a_pass_the_update_reports_agreement_and_load(record):
    counts = np.zeros((2, 3, 4), np.int64)
    counts[:, :, 1] = 5
    update = replace(record.update, load=ExpertLoad((1, 3, 5), counts))
    m = step_metrics(CONFIG, replace(record, old=replace(record.old, replay=None), update=update))
    assert m["router_replay/agreement_native"] == 0.75
    assert m["expert_load/live/max_share"] == m["expert_load/rollout/max_share"] == 1
    before = replace(record.old, load=ExpertLoad((1, 3, 5), np.ones_like(counts)))
    m = step_metrics(CONFIG, replace(record, old=before, update=update))
    assert m["expert_load/live/max_share"] == 0.25


def test_an_audited_step_says_how_much_was_compared(record):
    assert not {"router_replay/audit_equal", "router_replay/audit_entries"} & set(step_metrics(CONFIG, record))
    counts = replace(record.update.replay, audited=40, audit_equal=30)
    m = step_metrics(CONFIG, replace(record, update=replace(record.update, replay=counts)))
    assert m["router_replay/audit_equal"] == 0.75
    assert m["router_replay/audit_entries"] == 40
    assert declared_order(m)[1] == []


def test_sections_have_figures_of_their_own_if_there_are_several(record):
    two = {name: {"reward": "math", "tag_included": [name]} for name in ("sums", "proofs")}
    config = RLVRConfig(exp_name="x", pretrain="p", actor_train={}, actor_infer={}, rewards=two)
    record = replace(record, domains=["sums", "proofs"], groups=["a", "b"])
    metrics = step_metrics(config, record)
    assert {name: value for name, value in metrics.items() if name.startswith(("sums/", "proofs/"))} == {
        "sums/critic/score/mean": 1,
        "sums/tokens/response_length/mean": 2,
        "sums/tokens/response_length/max": 2,
        "sums/tokens/truncated_ratio": 0,
        "sums/rollout/groups": 1,
        "proofs/critic/score/mean": 0,
        "proofs/tokens/response_length/mean": 1,
        "proofs/tokens/response_length/max": 1,
        "proofs/tokens/truncated_ratio": 1,
        "proofs/rollout/groups": 1,
    }
    assert declared_order(metrics)[1] == []
    assert not [name for name in step_metrics(CONFIG, record) if name.startswith("sums/")]
