"""From sampled groups to a batch to learn from: rewards, log-probabilities of all sides, advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from roll_r3.algorithms.advantages import TokenAdvantages, token_advantages
from roll_r3.algorithms.corrections import corrected
from roll_r3.algorithms.entropy_quantile import weigh_by_entropy
from roll_r3.algorithms.sample_masks import mask_samples
from roll_r3.algorithms.shaping import shaped_scores
from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.models import BatchLogProbs, ModelGroup
from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.derived import algorithm_of, forces_ratio, needs_old_log_probs
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import Place
from roll_r3.data.prompts import Prompt
from roll_r3.errors import RollError
from roll_r3.pipelines.step_metrics import StepClock
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Answer, Rewards
from roll_r3.strategies.base import GenerateResult
from roll_r3.tracking.progress import Progress

_REASONS = 4
"""Number of reasons for dropped samples shown in a line."""


class Decoder(Protocol):
    """Part of a Hugging Face tokenizer needed by rewards."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class ScoredGroup:
    """Samples of a prompt, with their scores or a promise of them."""

    prompt: Prompt
    result: GenerateResult
    responses: Sequence[Response]
    """In the order of the result's trajectories."""
    answers: Future[list[Answer]]
    """One answer for each response."""


@dataclass(frozen=True)
class Collected:
    """Groups of a step."""

    groups: Sequence[ScoredGroup]
    """Groups to train on."""
    discarded: Sequence[ScoredGroup]
    """Groups dropped by a filter, without their trajectories."""
    place: Place
    """Place in the prompts after the step."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class ScoredSample:
    """A response with its reward, as read by the reward's rule."""

    sample_id: str
    prompt_id: str
    """The id of its row in the data."""
    prompt: str
    response: str
    ground_truth: str
    score: float
    domain: str = "default"
    """Name of the first section of `rewards` that scores the prompt's domain."""


@dataclass(frozen=True)
class Scored:
    """Samples with a reward."""

    trajectories: list[Trajectory]
    samples: list[ScoredSample]
    """In the order of `trajectories`."""
    failed: int
    """Number of responses dropped because they have no reward."""
    undecided: int
    """Number of responses with score 0 because a judge gave up on them."""
    by_rule: Mapping[str, float] = field(default_factory=dict)
    """Mean score of each reward rule."""

    @property
    def groups(self) -> list[str]:
        """The group of each trajectory."""
        return [t.group_id for t in self.trajectories]

    @property
    def scores(self) -> list[float]:
        return [sample.score for sample in self.samples]

    @property
    def domains(self) -> list[str]:
        """The domain of each trajectory."""
        return [sample.domain for sample in self.samples]


@dataclass(frozen=True)
class Experience:
    """Training data of a step: samples with rewards, advantages and the log-probabilities of all sides."""

    step: int
    clock: StepClock
    results: list[GenerateResult]
    scored: Scored
    advantages: TokenAdvantages | None
    """None where no sample or token is left."""
    batch: Batch | None
    """The scored samples; fillers may follow them. None where no sample or token is left."""
    old: BatchLogProbs | None
    """Those of the old policy; None: the update finds them (see `needs_old_log_probs`)."""
    metrics: dict[str, float]
    """Metrics of collecting, masking and correcting the samples."""
    place: Place
    """Place in the prompts after the step."""

    @property
    def trains(self) -> bool:
        """True if a token is left to train on."""
        return self.batch is not None and bool(self.batch.loss_mask_N.any())


class ExperienceMaker:
    """Makes the training data of a step; no weight changes."""

    def __init__(
        self,
        config: RLVRConfig,
        *,
        rewards: Rewards,
        trainer: ModelGroup,
        reference: ModelGroup | None,
        progress: Progress,
    ) -> None:
        self._config = config
        self._algorithm = algorithm_of(config)
        self._rewards = rewards
        self._trainer, self._reference = trainer, reference
        self._progress = progress

    def make(self, step: int, collected: Collected, clock: StepClock) -> Experience:
        """Score the samples and look at them with the trainer and the reference.

        Raises:
            RollError: no sample is left, though no filter dropped one.
        """
        metrics = dict(collected.metrics)
        results = [group.result for group in (*collected.groups, *collected.discarded)]
        with self._progress.stage("rewards", step), clock.stage("reward"):
            scored = score(step, collected, self._rewards, self._progress.say)
            metrics |= {f"reward/rule/{name}": mean for name, mean in scored.by_rule.items()}
            if not scored.trajectories:
                return Experience(step, clock, results, scored, None, None, None, metrics, collected.place)
            batch = Batch.from_trajectories(scored.trajectories).filled_up(self._samples_multiple())
            batch, shaped_n, shaping = shape_and_mask(batch, scored, self._algorithm)
            metrics |= shaping
        if not batch.loss_mask_N.any():
            return Experience(step, clock, results, scored, None, None, None, metrics, collected.place)
        if self._reference is not None:
            with self._progress.stage("reference", step), clock.stage("reference"):
                reference = self._reference.compute_log_probs(replace(batch, routes=None))
                batch = replace(batch, ref_log_probs_N=reference.log_probs_N)
        with clock.stage("old_log_probs"):
            old = self._old_log_probs(batch, step)
        batch = replace(batch, old_log_probs_N=old.log_probs_N if old else None)
        advantages = token_advantages(batch, shaped_n, scored.groups, scored.domains, self._algorithm)
        metrics |= advantages.metrics
        batch = replace(batch, advantages_N=advantages.advantages_N)
        if self._config.rollout_correction.corrects:
            correction = corrected(batch, self._config.rollout_correction)
            batch, metrics = correction.batch, metrics | correction.metrics
        if self._algorithm.top_entropy_quantile < 1:
            assert old is not None and old.entropy_N is not None
            batch, figures = weigh_by_entropy(batch, old.entropy_N, self._algorithm.top_entropy_quantile)
            metrics |= figures
        if forces_ratio(self._config, batch.num_samples):
            batch = replace(batch, old_log_probs_N=None)
        return Experience(step, clock, results, scored, advantages, batch, old, metrics, collected.place)

    def _old_log_probs(self, batch: Batch, step: int) -> BatchLogProbs | None:
        """Return the log-probabilities of the old policy; None if the update finds them."""
        if self._config.rollout_correction.bypass:
            return BatchLogProbs(batch.rollout_log_probs_N, None, None, 0.0)
        if not needs_old_log_probs(self._config, batch.num_samples):
            return None
        with self._progress.stage("old log-probs", step):
            return self._trainer.compute_log_probs(batch)

    def _samples_multiple(self) -> int:
        """Return a divisor of the number of samples: they fill the mini-batches of every rank."""
        args = self._config.actor_train.training_args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * self._trainer.data_parallel_size
        return int(np.lcm(size, self._reference.data_parallel_size)) if self._reference else size


def shape_and_mask(
    batch: Batch, scored: Scored, algorithm: AlgorithmConfig
) -> tuple[Batch, npt.NDArray[np.float64], dict[str, float]]:
    """Fill in `scores_n`, and mask samples.

    Args:
        batch: the scored samples; fillers may follow.

    Returns:
        (batch, shaped score of each scored sample, metrics of shaping and masks).
    """
    scores_n = np.array(scored.scores)
    lengths_n = np.array([t.num_sampled for t in scored.trajectories])
    truncated = [t.finish_reason == "length" for t in scored.trajectories]
    fillers = batch.num_samples - len(scores_n)
    batch = replace(batch, scores_n=np.pad(scores_n, (0, fillers)).astype(np.float32))
    batch, masking = mask_samples(batch, scores_n, scored.groups, truncated, algorithm)
    shaped_n, shaping = shaped_scores(scores_n, lengths_n, algorithm)
    return batch, shaped_n, masking | shaping


def score(step: int, collected: Collected, rewards: Rewards, say: Callable[[str], None]) -> Scored:
    """Wait for the scores of a step's samples; report dropped samples with the reasons.

    Raises:
        RollError: no sample is left, though no filter dropped one; or too many responses have no reward.
    """
    decided = [*collected.groups, *collected.discarded]
    responses = [response for group in decided for response in group.responses]
    dropped = [why for group in decided for why in group.result.dropped.values()]
    reasons = sorted(set(dropped))[:_REASONS]
    if dropped:
        say(
            f"step {step}: dropped {len(dropped)} of {len(dropped) + len(responses)} samples not returned by the "
            f"engines: {'; '.join(reasons)}"
        )
    scores = rewards.accept(responses, rewards.wait_for([(group.responses, group.answers) for group in decided]))
    if scores.failed:
        say(f"step {step}: dropped {scores.failed} of {len(responses)} responses without a reward: {scores.why}")
    trajectories, samples = [], []
    trained = [
        (g.prompt, *both) for g in collected.groups for both in zip(g.result.trajectories, g.responses, strict=True)
    ]
    for (prompt, t, response), value in zip(trained, scores.scores, strict=False):  # discarded groups come last
        if value is not None:
            trajectories.append(t)
            samples.append(
                ScoredSample(
                    t.sample_id,
                    prompt.prompt_id,
                    prompt.text,
                    response.response,
                    prompt.ground_truth,
                    value,
                    rewards.section_of(prompt.domain),
                )
            )
    if not trajectories and not collected.discarded:
        raise RollError(
            "no sample of the step is left: " + "; ".join([*reasons, scores.why] if scores.why else reasons)
        )
    return Scored(trajectories, samples, scores.failed, scores.undecided, scores.by_rule)


def response_of(prompt: Prompt, trajectory: Trajectory, rewards: Rewards, decoder: Decoder) -> Response:
    """Return the values of a sample for a reward rule."""
    ids = trajectory.response_ids.tolist()
    return Response(
        response=decoder.decode(ids, skip_special_tokens=rewards.skips_special_tokens(prompt.domain)),
        ground_truth=prompt.ground_truth,
        domain=prompt.domain,
        prompt=prompt.text,
        messages=prompt.messages,
        row=prompt.row,
        finish_reason=trajectory.finish_reason,
        num_response_tokens=len(ids),
    )
