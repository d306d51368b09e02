"""Scores, masks and shaping on their way into a step's batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.pipelines.experience import Scored, ScoredSample, shape_and_mask
from roll_r3.rewards.functions import Response
from roll_r3.tracking.names import declared_order
from tests.unit.pipelines.test_rlvr import Cluster, pipeline


class Graded(Cluster):
    """The first prompt is right in half of the responses, the second always."""

    def scores_of(self, responses: Sequence[Response]) -> list[float]:
        return [1.0, 0.0] if responses[0].ground_truth == "0" else [1.0, 1.0]


def test_a_step_trains_on_the_samples_kept_with_the_scores_as_shaped() -> None:
    shaping = {"overlong_buffer": {"len": 1}, "response_length": 1, "reward_scale": 2.0}
    experience = pipeline(
        {}, [], Graded({}), 4, adv_estimator="rloo", difficulty_mask=True, advantage_clip=1, **shaping
    ).sample(1)
    batch = experience.batch
    assert batch.scores_n is not None and batch.advantages_N is not None
    assert batch.scores_n.tolist() == [1, 0, 1, 1], "before shaping"
    assert batch.loss_mask_N.tolist() == [True, True, False, False]
    assert batch.advantages_N.tolist() == [1, -1, 0, 0]
    assert experience.advantages.rewards_n.tolist() == [2, -2, 0, 0]
    wanted = {
        "actor/difficulty_mask_ratio": 0.5,
        "actor/final_mask_ratio": 0.5,
        "actor/samples_used": 2.0,
        "actor/samples_total": 4.0,
        "critic/shaped_score/mean": -0.5,
        "critic/shaped_score/max": 0.0,
        "critic/shaped_score/min": -2.0,
        "reward/overlong_ratio": 1.0,
        "critic/advantage_clip_frac": 1.0,
    }
    assert {name: experience.metrics[name] for name in wanted} == wanted
    assert declared_order(experience.metrics)[1] == []


def test_fillers_have_score_0_and_truncated_samples_are_known_by_their_end() -> None:
    """The longest sample ends by itself, the shortest is cut: a limit below response_length."""
    ends = [("stop", 5), ("length", 2), ("stop", 3)]
    trajectories = [
        Trajectory.one_turn(
            f"s{i}", "g", prompt_ids=[1], response_ids=[1] * n, log_probs=[-1.0] * n, version=0, finish_reason=end
        )
        for i, (end, n) in enumerate(ends)
    ]
    scored = Scored(
        trajectories, [ScoredSample(t.sample_id, "p", "", "", "", 0.5) for t in trajectories], failed=0, undecided=0
    )
    config = RLVRConfig(exp_name="x", pretrain="p", actor_train={}, actor_infer={}, max_len_mask=True)
    batch, shaped_n, metrics = shape_and_mask(
        Batch.from_trajectories(trajectories).filled_up(4), scored, algorithm_of(config)
    )
    assert batch.scores_n is not None
    assert (batch.scores_n.tolist(), batch.scores_n.dtype) == ([0.5, 0.5, 0.5, 0], np.float32)
    assert batch.sum_per_sample(batch.loss_mask_N).tolist() == [5, 0, 3, 0]
    assert shaped_n.tolist() == [0.5] * 3
    assert metrics["actor/max_len_mask_ratio"] == 2 / 3
    assert declared_order(metrics)[1] == []
