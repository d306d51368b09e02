"""The training loop, top to bottom: sample, score, look back, update, send the weights out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.cluster.models import ModelGroup
from roll_r3.cluster.rollouts import RolloutGroup
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.prompts import Prompt
from roll_r3.pipelines.experience import Decoder, Experience, ExperienceMaker, ScoredSample
from roll_r3.pipelines.sampling import group_requests, sample_all
from roll_r3.pipelines.silence import SilenceWatch
from roll_r3.pipelines.step_metrics import StepClock, StepRecord, step_metrics
from roll_r3.rewards.scoring import Rewards
from roll_r3.tracking.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step."""

    metrics: dict[str, float]
    samples: list[ScoredSample]


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
        self._prompts = prompts
        self._pool = EnginePool(config, rollout, trainer, progress.say)
        self._experience = ExperienceMaker(
            config, decoder=decoder, rewards=rewards, trainer=trainer, reference=reference, progress=progress
        )
        self._trainer = trainer
        self._progress = progress
        self._silence = SilenceWatch(config)
        self.samples_seen = 0
        """Samples trained on since the run began."""

    def start(self, *, done: int = 0, samples_seen: int = 0) -> None:
        """Give the engines the trainer's weights, so both sides begin from the same numbers.

        Args:
            done: number of steps behind the trainer's weights, and so their version.
            samples_seen: number of samples in these steps.
        """
        self.samples_seen = samples_seen
        self._pool.update_weights(version=done)

    def sample(self, step: int) -> Experience:
        """Run the first half of step `step`, counted from 1. No weight changes, so it may be interrupted anywhere."""
        clock = StepClock()
        with self._progress.stage("rollout", step), clock.stage("generate"):
            prompts = next(self._prompts)
            results = sample_all(self._pool, group_requests(self._config, prompts, step))
        return self._experience.make(step, list(zip(prompts, results, strict=True)), clock)

    def learn(self, experience: Experience) -> StepResult:
        """Run the second half: update the weights and send them to the engines."""
        step, clock, batch = experience.step, experience.clock, experience.batch
        with self._progress.stage("update", step), clock.stage("train"):
            update = self._trainer.train_step(batch, step)
        old = experience.old or update.old
        assert old is not None
        for text in update.skipped:
            logger.warning("%s", text)
            self._progress.say(text)
        with self._progress.stage("weights to the engines", step), clock.stage("model_update"):
            self._pool.update_weights(version=step)
        scored = experience.scored
        self.samples_seen += len(scored.trajectories)
        record = StepRecord(
            step=step,
            seconds=clock.stop(),
            trajectories=scored.trajectories,
            groups=scored.groups,
            scores=np.array(scored.scores),
            advantages=experience.advantages,
            batch=replace(batch, old_log_probs_N=old.log_probs_N),
            old=old,
            update=update,
            dropped=sum(len(r.dropped) for r in experience.results),
            failed_rewards=scored.failed,
            undecided_rewards=scored.undecided,
            retries=sum(r.retries for r in experience.results),
            engine_restarts=self._pool.step_done(),
            samples_seen=self.samples_seen,
        )
        metrics = step_metrics(self._config, record) | experience.metrics
        if warning := self._silence.observe(metrics):
            logger.warning("%s", warning)
            self._progress.say(f"step {step}: {warning}")
        return StepResult(metrics, scored.samples)
