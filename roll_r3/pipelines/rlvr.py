"""The training loop, top to bottom: sample, score, look back, update, send the weights out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from roll_r3.algorithms.advantages import TokenAdvantages, token_advantages
from roll_r3.batch.batch import Batch
from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.groups import BatchLogProbs, ModelGroup, RolloutGroup
from roll_r3.config.derived import algorithm_of, forces_ratio, needs_old_log_probs
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.prompts import Prompt
from roll_r3.errors import RollError
from roll_r3.pipelines.engines import Engines
from roll_r3.pipelines.silence import SilenceWatch
from roll_r3.pipelines.step_metrics import StepRecord, step_metrics
from roll_r3.rewards.calls import Response
from roll_r3.rewards.scoring import Rewards, Scores
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.tracking.progress import Progress

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that rewards need."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class ScoredSample:
    """A response with its reward, in the words that its rule read."""

    sample_id: str
    prompt_id: str
    """The id of its row in the data."""
    prompt: str
    response: str
    ground_truth: str
    score: float


@dataclass(frozen=True)
class StepResult:
    metrics: dict[str, float]
    samples: list[ScoredSample]


@dataclass
class StepClock:
    """Seconds of each stage of one step."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"time/step_{name}"] = time.perf_counter() - start

    def stop(self) -> dict[str, float]:
        """The seconds of all stages, and of the step as a whole."""
        return self.seconds | {"time/step_total": time.perf_counter() - self.started}


@dataclass(frozen=True)
class Experience:
    """What a step learns from: its samples with rewards, advantages and the log-probabilities of all sides."""

    step: int
    clock: StepClock
    results: list[GenerateResult]
    failed_rewards: int
    """Responses among them that have no reward, and so no place in what follows."""
    undecided_rewards: int
    """Responses that score 0 because a judge gave up on them."""
    trajectories: list[Trajectory]
    groups: list[str]
    """The prompt of each of them."""
    samples: list[ScoredSample]
    """Of `trajectories`, in their order."""
    advantages: TokenAdvantages
    batch: Batch
    old: BatchLogProbs | None
    """The trainer's before the update; None: the update finds them (see `needs_old_log_probs`)."""


class RLVRPipeline:
    """Reinforcement learning with verifiable rewards. A step of the run is `sample`, then `learn`."""

    def __init__(
        self,
        config: RLVRConfig,
        *,
        prompts: Iterator[list[Prompt]],
        decoder: Decoder,
        rewards: Rewards,
        rollout: RolloutGroup,
        trainer: ModelGroup,
        reference: ModelGroup | None,
        progress: Progress,
    ) -> None:
        self._config = config
        self._algorithm = algorithm_of(config)
        self._prompts = prompts
        self._decoder = decoder
        self._rewards = rewards
        self._engines = Engines(config, rollout, trainer, progress.say)
        self._trainer = trainer
        self._reference = reference
        self._progress = progress
        self._silence = SilenceWatch(config)
        self.samples_seen = 0
        """Samples trained on since the run began."""

    def start(self, *, done: int = 0, samples_seen: int = 0) -> None:
        """Give the engines the trainer's weights, so that both sides begin from the same numbers.

        Args:
            done: steps that made the trainer's weights what they are, which is their version.
            samples_seen: in these steps.
        """
        self.samples_seen = samples_seen
        self._engines.send_weights(version=done)

    def sample(self, step: int) -> Experience:
        """The first half of step `step`, counted from 1: no weight changes, and it may be broken off anywhere."""
        clock = StepClock()
        with self._progress.stage("rollout", step), clock.stage("generate"):
            prompts = next(self._prompts)
            results = self._engines.generate(self._requests(prompts, step))
        with self._progress.stage("rewards", step), clock.stage("reward"):
            trajectories, groups, samples, scored = self._score(step, prompts, results)
            batch = Batch.from_trajectories(trajectories).filled_up(self._samples_multiple())
        if self._reference is not None:
            with self._progress.stage("reference", step), clock.stage("reference"):
                reference = self._reference.compute_log_probs(replace(batch, routes=None))
                batch = replace(batch, ref_log_probs_N=reference.log_probs_N)
        old = None
        with clock.stage("old_log_probs"):
            if needs_old_log_probs(self._config, batch.num_samples):
                with self._progress.stage("old log-probs", step):
                    old = self._trainer.compute_log_probs(batch)
                batch = replace(batch, old_log_probs_N=old.log_probs_N)
        scores = np.array([s.score for s in samples])
        advantages = token_advantages(batch, scores, groups, self._algorithm)
        batch = replace(batch, advantages_N=advantages.advantages_N)
        if forces_ratio(self._config, batch.num_samples):
            batch = replace(batch, old_log_probs_N=None)
        return Experience(
            step,
            clock,
            results,
            scored.failed,
            scored.undecided,
            trajectories,
            groups,
            samples,
            advantages,
            batch,
            old,
        )

    def learn(self, experience: Experience) -> StepResult:
        """The second half: update the weights and send them to the engines."""
        step, clock, batch = experience.step, experience.clock, experience.batch
        with self._progress.stage("update", step), clock.stage("train"):
            update = self._trainer.train_step(batch, step)
        old = experience.old or update.old
        assert old is not None
        for text in update.skipped:
            logger.warning("%s", text)
            self._progress.say(text)
        with self._progress.stage("weights to the engines", step), clock.stage("model_update"):
            self._engines.send_weights(version=step)
        self.samples_seen += len(experience.trajectories)
        record = StepRecord(
            step=step,
            seconds=clock.stop(),
            trajectories=experience.trajectories,
            groups=experience.groups,
            scores=np.array([s.score for s in experience.samples]),
            advantages=experience.advantages,
            batch=replace(batch, old_log_probs_N=old.log_probs_N),
            old=old,
            update=update,
            dropped=sum(len(r.dropped) for r in experience.results),
            failed_rewards=experience.failed_rewards,
            undecided_rewards=experience.undecided_rewards,
            retries=sum(r.retries for r in experience.results),
            engine_restarts=self._engines.step_done(),
            samples_seen=self.samples_seen,
        )
        metrics = step_metrics(self._config, record)
        if warning := self._silence.observe(metrics):
            logger.warning("%s", warning)
            self._progress.say(f"step {step}: {warning}")
        return StepResult(metrics, experience.samples)

    def _requests(self, prompts: Sequence[Prompt], step: int) -> list[GenerateRequest]:
        group = self._config.num_return_sequences_in_group
        seeds = np.random.default_rng((self._config.seed, step)).integers(1 << 31, size=(len(prompts), group))
        return [
            GenerateRequest(
                prompt_ids=prompt.token_ids,
                sample_ids=tuple(f"step{step}/prompt{i}/sample{j}" for j in range(group)),
                seeds=tuple(int(s) for s in seeds[i]),
            )
            for i, prompt in enumerate(prompts)
        ]

    def _score(
        self, step: int, prompts: Sequence[Prompt], results: Sequence[GenerateResult]
    ) -> tuple[list[Trajectory], list[str], list[ScoredSample], Scores]:
        """The step's trajectories that have a reward, the group of each, each as a sample; the scores of all."""
        found = [(i, t, self._response(prompts[i], t)) for i, result in enumerate(results) for t in result.trajectories]
        dropped = [why for result in results for why in result.dropped.values()]
        reasons = sorted(set(dropped))[:4]
        if dropped:
            asked = len(dropped) + len(found)
            self._progress.say(
                f"step {step}: left out {len(dropped)} of {asked} samples, which the engines did not give: "
                f"{'; '.join(reasons)}"
            )
        scored = self._rewards.score([response for _, _, response in found])
        if scored.failed:
            self._progress.say(
                f"step {step}: left out {scored.failed} of {len(found)} responses, which have no reward: {scored.why}"
            )
        trajectories, groups, samples = [], [], []
        for (i, t, response), score in zip(found, scored.scores, strict=True):
            if score is not None:
                trajectories.append(t)
                groups.append(str(i))
                prompt, text = prompts[i], response.response
                samples.append(
                    ScoredSample(t.sample_id, prompt.prompt_id, prompt.text, text, prompt.ground_truth, score)
                )
        if not trajectories:
            raise RollError(
                "no sample of the step is left: " + "; ".join([*reasons, scored.why] if scored.why else reasons)
            )
        return trajectories, groups, samples, scored

    def _response(self, prompt: Prompt, trajectory: Trajectory) -> Response:
        """Values of a sample that a reward rule may ask for."""
        ids = trajectory.response_ids_R.tolist()
        skips = self._rewards.skips_special_tokens(prompt.domain)
        return Response(
            response=self._decoder.decode(ids, skip_special_tokens=skips),
            ground_truth=prompt.ground_truth,
            domain=prompt.domain,
            prompt=prompt.text,
            messages=prompt.messages,
            row=prompt.row,
            finish_reason=trajectory.finish_reason,
            num_response_tokens=len(ids),
        )

    def _samples_multiple(self) -> int:
        """Samples of a step must divide into every rank's mini-batches."""
        args = self._config.actor_train.training_args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * self._trainer.data_parallel_size
        return int(np.lcm(size, self._reference.data_parallel_size)) if self._reference else size
