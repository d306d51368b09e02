"""Step with missing samples, in front of a stand-in for the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.models import BatchLogProbs, BatchUpdate
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import prompt_source
from roll_r3.data.prompts import Prompt
from roll_r3.errors import RollError
from roll_r3.pipelines.rlvr import RLVRPipeline
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Answer, Scores
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.tracking.names import declared_order
from roll_r3.tracking.progress import Progress

PROMPTS = [
    Prompt(
        f"row-{i}",
        f"question {i}",
        (1, 2),
        str(i),
        domain=domain,
        messages=({"role": "user", "content": f"question {i}"},),
        row={"tests": [i]},
    )
    for i, domain in enumerate(("plain", "special"))
]


IN_ORDER = 0
"""Seed under which two prompts are drawn in the order of reading."""


def trajectory(sample_id: str, group_id: str) -> Trajectory:
    """One token to one token."""
    return Trajectory.one_turn(
        sample_id, group_id, prompt_ids=[1], response_ids=[1], log_probs=[-1.0], version=0, finish_reason="stop"
    )


class Cluster:
    """Rollout, trainer, tokenizer and rewards: samples in `withheld` do not come, others are one token long."""

    data_parallel_size = 1

    names = ("actor_infer-0",)

    def __init__(self, withheld: dict[str, str]) -> None:
        self.withheld = withheld
        self.decoded: list[bool] = []
        self.scored: list[Response] = []
        self.passes = 0
        """Number of passes before updates."""
        self.trained: list[Batch] = []
        self.versions: list[int] = []

    def begin_generate(self, name: str, requests: Sequence[GenerateRequest]) -> list[int]:
        self.results = [
            GenerateResult(
                tuple(trajectory(i, r.group_id) for i in r.sample_ids if i not in self.withheld),
                dropped={i: self.withheld[i] for i in r.sample_ids if i in self.withheld},
            )
            for r in requests
        ]
        return list(range(len(requests)))

    def abort(self, calls: Sequence[Any]) -> None:
        raise NotImplementedError("nothing is aborted")

    def ended(self, timeout: float | None) -> dict[int, GenerateResult]:
        return dict(enumerate(self.results))

    def compute_log_probs(self, batch: Batch) -> BatchLogProbs:
        self.passes += 1
        return BatchLogProbs(np.full(batch.loss_mask_N.shape, -2, np.float32), None, None, 0.0)

    def train_step(self, batch: Batch, step: int) -> BatchUpdate:
        self.trained.append(batch)
        shape = batch.loss_mask_N.shape
        found = BatchLogProbs(np.full(shape, -3, np.float32), np.full(shape, 0.5, np.float32), None, 0.0)
        return BatchUpdate({}, None, 0.0, (), None if batch.old_log_probs_N is not None else found)

    def down(self, *, ask: bool) -> dict[str, str]:
        return {}

    def weight_targets(self) -> list[Any]:
        return []

    def connect_engines(self, targets: Sequence[Any]) -> None: ...

    def update_weights(self, version: int) -> str:
        self.versions.append(version)
        return ""

    def weights_updated(self, version: int) -> None: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.decoded.append(skip_special_tokens)
        return "an answer" if skip_special_tokens else "an answer<end>"

    def skips_special_tokens(self, domain: str) -> bool:
        return domain == "plain"

    def section_of(self, domain: str) -> str:
        return domain

    def begin(self, responses: Sequence[Response]) -> Future[list[Answer]]:
        self.scored += responses
        answers: Future[list[Answer]] = Future()
        answers.set_result([Answer(score, {}) for score in self.scores_of(responses)])
        return answers

    def scores_of(self, responses: Sequence[Response]) -> list[float]:
        return [1.0 for _ in responses]

    def wait_for(self, groups: Sequence[tuple[Sequence[Response], Future[list[Answer]]]]) -> list[Answer]:
        return [answer for _, answers in groups for answer in answers.result()]

    def accept(self, responses: Sequence[Response], answers: Sequence[Answer]) -> Scores:
        assert responses == self.scored
        return Scores([answer.score for answer in answers], why="", undecided=1, by_rule={"mine": 0.75})


class FarReference(Cluster):
    """Reference half a nat below the policy everywhere."""

    def compute_log_probs(self, batch: Batch) -> BatchLogProbs:
        return BatchLogProbs(np.full(batch.loss_mask_N.shape, -2.5, np.float32), None, None, 0.0)


def pipeline(
    withheld: dict[str, str],
    said: list[str],
    cluster: Any = None,
    mini_batch: int = 1,
    frozen: Any = None,
    **fields: Any,
) -> RLVRPipeline:
    cluster = cluster or Cluster(withheld)
    progress = Progress(1)
    progress.say = said.append  # type: ignore[method-assign]
    config = RLVRConfig(
        exp_name="x",
        pretrain="p",
        rollout_batch_size=2,
        num_return_sequences_in_group=2,
        actor_train={
            "training_args": {"gradient_accumulation_steps": mini_batch},
            "router_replay": {"mode": fields.pop("mode", "disable")},
        },
        actor_infer={},
        **fields,
    )
    return RLVRPipeline(
        config,
        prompts=prompt_source(PROMPTS, 2, IN_ORDER, shares={}, section_of=str),
        decoder=cluster,
        rewards=cluster,
        rollout=cluster,
        trainer=cluster,
        reference=frozen or (cluster if config.reference else None),
        progress=progress,
    )


def test_samples_that_the_engines_did_not_give_are_said() -> None:
    said: list[str] = []
    withheld = {f"step1/prompt1/sample{i}": "HTTP 500" for i in range(2)} | {"step1/prompt0/sample0": "too slow"}
    experience = pipeline(withheld, said).sample(1)
    assert said == ["step 1: dropped 3 of 4 samples not returned by the engines: HTTP 500; too slow"]
    [sample] = experience.scored.samples
    assert (sample.sample_id, sample.prompt_id) == ("step1/prompt0/sample1", "row-0")


def test_nothing_is_said_where_all_came() -> None:
    said: list[str] = []
    assert [s.prompt_id for s in pipeline({}, said).sample(1).scored.samples] == ["row-0", "row-0", "row-1", "row-1"]
    assert said == []


def test_a_step_without_any_sample_says_why() -> None:
    withheld = {f"step1/prompt{i}/sample{j}": "HTTP 500" for i in range(2) for j in range(2)}
    with pytest.raises(RollError, match="no sample of the step is left: HTTP 500"):
        pipeline(withheld, []).sample(1)


def test_the_penalty_comes_off_the_advantages_of_the_tokens() -> None:
    penalised = {"add_token_level_kl": True, "init_kl_coef": 0.1, "reference": {}}
    experience = pipeline({}, [], frozen=FarReference({}), **penalised).sample(1)
    assert experience.batch.advantages_N is not None
    np.testing.assert_allclose(experience.batch.advantages_N, -0.05, rtol=1e-6)
    np.testing.assert_allclose(experience.advantages.rewards_n, -0.05, rtol=1e-6)
    assert {s.score for s in experience.scored.samples} == {1.0}, "the scores are as they were given"


def test_a_rule_is_offered_all_that_is_known_of_a_sample() -> None:
    cluster = Cluster({})
    experience = pipeline({}, [], cluster).sample(1)
    first, last = cluster.scored[0], cluster.scored[-1]
    assert first.values(["response", "ground_truth", "prompt", "messages", "row", "domain"]) == {
        "response": "an answer",
        "ground_truth": "0",
        "prompt": "question 0",
        "messages": [{"role": "user", "content": "question 0"}],
        "row": {"tests": [0]},
        "domain": "plain",
    }
    assert (first.finish_reason, first.num_response_tokens) == ("stop", 1)
    assert (last.row, last.prompt) == ({"tests": [1]}, "question 1")
    assert experience.scored.undecided == 1
    assert experience.metrics["reward/rule/mine"] == 0.75


def test_each_response_is_decoded_once_as_its_rule_reads_it() -> None:
    cluster = Cluster({})
    samples = pipeline({}, [], cluster).sample(1).scored.samples
    assert cluster.decoded == [True, True, False, False]
    assert [r.response for r in cluster.scored] == ["an answer"] * 2 + ["an answer<end>"] * 2
    assert [s.response for s in samples] == [r.response for r in cluster.scored]


KL = {"reference": {}, "add_token_level_kl": True, "init_kl_coef": 0.1}


@pytest.mark.parametrize(
    ("mini_batch", "withheld", "fields", "passes", "forced"),
    [
        (4, 0, {}, 0, True),
        (4, 1, {}, 0, True),  # a filler takes the place of the lost one
        (2, 2, {}, 0, True),  # the rest is one mini-batch
        (2, 0, {}, 1, False),
        (4, 0, {"ppo_epochs": 2}, 1, False),
        (4, 0, {"force_on_policy_ratio": False}, 1, False),
        (4, 0, {"force_on_policy_ratio": True}, 0, True),
        (4, 0, {"mode": "R2"}, 1, True),
        (4, 0, KL, 2, True),  # including the reference's
    ],
)
def test_a_pass_before_the_update_is_made_where_something_needs_it(
    mini_batch: int, withheld: int, fields: dict[str, Any], passes: int, forced: bool
) -> None:
    cluster = Cluster({f"step1/prompt0/sample{i}": "HTTP 500" for i in range(withheld)})
    run = pipeline({}, [], cluster, mini_batch, **fields)

    metrics = run.learn(run.sample(1)).metrics

    [trained] = cluster.trained
    assert cluster.passes == passes
    assert (trained.old_log_probs_N is None) == forced
    before = passes - (fields is KL)
    assert metrics["critic/old_log_prob/mean"] == (-2 if before else -3)
    assert metrics["rollout_corr/kl"] == (1 if before else 2)
    assert ("critic/entropy/mean" in metrics) == (not before)
    assert metrics["time/step_old_log_probs"] >= 0


class Uncertain(Cluster):
    """Each token with another entropy: 0, 1, 2, ... nats."""

    def compute_log_probs(self, batch: Batch) -> BatchLogProbs:
        entropy_N = np.arange(len(batch.loss_mask_N), dtype=np.float32)
        return replace(super().compute_log_probs(batch), entropy_N=entropy_N)


def test_tokens_are_chosen_by_the_entropies_of_a_pass_before_the_update() -> None:
    """The ratio is 1 by definition here, so nothing else needs the pass."""
    cluster = Uncertain({})
    run = pipeline({}, [], cluster, 4, top_entropy_quantile=0.5)

    metrics = run.learn(run.sample(1)).metrics

    [trained] = cluster.trained
    assert (cluster.passes, trained.old_log_probs_N) == (1, None)
    assert trained.pg_weights_N is not None
    assert trained.pg_weights_N.tolist() == [0, 0, 1, 1]
    assert metrics["critic/entropy/threshold"] == 1.5


@pytest.mark.parametrize(("mini_batch", "forced"), [(4, True), (2, False)])
def test_corrections_reach_the_update_and_the_metrics(mini_batch: int, forced: bool) -> None:
    """The old policy is a nat below the rollout everywhere: ratio 1 / e."""
    cluster = Cluster({})
    run = pipeline({}, [], cluster, mini_batch, rollout_correction={"is_weight": "token"})
    metrics = run.learn(run.sample(1)).metrics
    [trained] = cluster.trained
    assert cluster.passes == 1
    assert (trained.old_log_probs_N is None) == forced
    assert trained.pg_weights_N == pytest.approx(np.exp([-1] * 4))
    assert metrics["actor/is_weight_mean"] == pytest.approx(np.exp(-1))
    assert metrics["rollout_corr/kl"] == 1
    assert metrics["rollout_corr/ess"] == 1
    assert declared_order(metrics)[1] == []


def test_a_step_of_which_filters_leave_nothing_still_reports() -> None:
    cluster = Cluster({})
    run = pipeline({}, [], cluster, 4, rollout_correction={"filters": [{"low": 0.5}], "opsm_delta": 3})
    experience = run.sample(1)
    metrics = run.learn(experience).metrics
    assert experience.batch is not None and not experience.batch.loss_mask_N.any()
    assert cluster.trained == []
    assert metrics["mask/final_mask_sum_eq_0"] == 1
    assert metrics["rollout_corr/rejected_tokens"] == metrics["rollout_corr/rejected_samples"] == 1
    assert metrics["rollout_corr/kl"] == 1
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("mini_batch", [4, 2])
def test_bypass_trains_against_the_rollout_without_a_pass(mini_batch: int) -> None:
    cluster = Cluster({})
    run = pipeline({}, [], cluster, mini_batch, rollout_correction={"bypass": True})
    metrics = run.learn(run.sample(1)).metrics
    [trained] = cluster.trained
    assert cluster.passes == 0
    np.testing.assert_array_equal(trained.old_log_probs_N, trained.rollout_log_probs_N)
    assert metrics["critic/old_log_prob/mean"] == -1
    assert not [name for name in metrics if name.startswith("rollout_corr/")]


def test_a_step_whose_groups_are_all_filtered_out_keeps_the_weights_and_goes_on() -> None:
    """Every response scores 1."""
    cluster, said = Cluster({}), list[str]()
    run = pipeline({}, said, cluster, filter_groups={"enable": True}, reference={}, use_kl_loss=True)
    experience = run.sample(1)
    result = run.learn(experience)
    assert (cluster.trained, cluster.passes, cluster.versions) == ([], 0, [1]), "the engines get their version"
    assert (result.samples, run.samples_seen, run.place) == ([], 0, experience.place)
    assert said == [
        "step 1: 0 of 2 groups passed the filter after 2 prompts (all prompts of the data): the step is smaller",
        "step 1: no token is left to train on, so the weights stay as they are",
    ]
    metrics = result.metrics
    assert (metrics["mask/final_mask_sum_eq_0"], metrics["rollout/filter_all_right"]) == (1, 1)
    assert all(np.isfinite(value) for value in metrics.values())
    assert not [name for name in metrics if name.startswith(("critic/", "actor/"))]
    assert declared_order(metrics)[1] == []
    Progress(1).step_done(1, metrics)


def test_steps_without_a_token_left_to_train_on_are_reported_with_the_reason() -> None:
    """Every group has mean 1, outside the bounds."""
    cluster, said = Cluster({}), list[str]()
    run = pipeline({}, said, cluster, difficulty_mask=True)
    for step in (1, 2, 3):
        cluster.scored.clear()
        run.learn(run.sample(step))
    assert "NOTHING IS LEARNED" in said[-1] and "leave out 100% of the samples" in said[-1]


def test_a_step_whose_tokens_are_all_masked_keeps_the_weights_and_shows_its_samples() -> None:
    """Every group has mean 1, outside the bounds."""
    cluster = Cluster({})
    run = pipeline({}, [], cluster, difficulty_mask=True, reference={}, use_kl_loss=True)
    result = run.learn(run.sample(1))
    assert (cluster.trained, cluster.passes, run.samples_seen) == ([], 0, 0)
    assert len(result.samples) == 4
    assert result.metrics["critic/score/mean"] == 1
    assert result.metrics["actor/final_mask_ratio"] == 0
    assert all(np.isfinite(value) for value in result.metrics.values())


def test_a_usual_step_is_counted_as_trained() -> None:
    run = pipeline({}, [], Cluster({}))
    metrics = run.learn(run.sample(1)).metrics
    assert (metrics["mask/final_mask_sum_eq_0"], run.samples_seen) == (0, 4)
    assert not [name for name in metrics if name.startswith(("rollout/filter", "plain/"))]
