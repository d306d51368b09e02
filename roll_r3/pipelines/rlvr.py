"""The training loop, top to bottom: sample, score, look back, update, send the weights out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.cluster.models import ModelGroup
from roll_r3.cluster.rollouts import RolloutGroup
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import PromptSource
from roll_r3.data.evaluation_sets import EvaluationSet
from roll_r3.pipelines.evaluation import Evaluation, Evaluator
from roll_r3.pipelines.experience import Decoder, Experience, ExperienceMaker, ScoredSample
from roll_r3.pipelines.sampling import Collector
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
        prompts: PromptSource,
        decoder: Decoder,
        rewards: Rewards,
        rollout: RolloutGroup,
        trainer: ModelGroup,
        reference: ModelGroup | None,
        progress: Progress,
        evaluation_sets: Sequence[EvaluationSet] = (),
    ) -> None:
        self._config = config
        self._pool = EnginePool(config, rollout, trainer, progress.say)
        self._collector = Collector(config, self._pool, prompts, rewards, decoder, progress.say)
        self._experience = ExperienceMaker(
            config, rewards=rewards, trainer=trainer, reference=reference, progress=progress
        )
        self._evaluator = Evaluator(
            config, evaluation_sets, pool=self._pool, rewards=rewards, decoder=decoder, progress=progress
        )
        self._trainer = trainer
        self._progress = progress
        self._silence = SilenceWatch(config)
        self.samples_seen = 0
        """Samples trained on since the run began."""
        self.place = prompts.place
        """Place in the prompts after the last step."""

    def start(self, *, done: int = 0, samples_seen: int = 0) -> None:
        """Give the engines the trainer's weights, so both sides begin from the same numbers.

        Args:
            done: number of steps behind the trainer's weights, and so their version.
            samples_seen: number of samples in these steps.
        """
        self.samples_seen = samples_seen
        self._pool.update_weights(version=done)

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate the weights after `step` steps. No weight changes, so it may be interrupted anywhere."""
        return self._evaluator.run(step)

    def sample(self, step: int) -> Experience:
        """Run the first half of step `step`, counted from 1. No weight changes, so it may be interrupted anywhere."""
        clock = StepClock()
        with self._progress.stage("rollout", step), clock.stage("generate"):
            collected = self._collector.collect(step)
        return self._experience.make(step, collected, clock)

    def learn(self, experience: Experience) -> StepResult:
        """Run the second half: update the weights and send them to the engines."""
        step, clock, batch = experience.step, experience.clock, experience.batch
        old, update = experience.old, None
        if experience.trains:
            assert batch is not None
            with self._progress.stage("update", step), clock.stage("train"):
                update = self._trainer.train_step(batch, step)
            old = old or update.old
            for text in update.skipped:
                logger.warning("%s", text)
                self._progress.say(text)
        else:
            self._progress.say(f"step {step}: no token is left to train on, so the weights stay as they are")
        with self._progress.stage("weights to the engines", step), clock.stage("model_update"):
            self._pool.update_weights(version=step)
        if batch is not None and old is not None:
            batch = replace(batch, old_log_probs_N=old.log_probs_N)
        scored = experience.scored
        if update is not None:
            self.samples_seen += len(scored.trajectories)
        self.place = experience.place
        record = StepRecord(
            step=step,
            seconds=clock.stop(),
            trajectories=scored.trajectories,
            groups=scored.groups,
            domains=scored.domains,
            scores=np.array(scored.scores),
            advantages=experience.advantages,
            batch=batch,
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
        if scored.trajectories and (warning := self._silence.observe(metrics)):
            logger.warning("%s", warning)
            self._progress.say(f"step {step}: {warning}")
        return StepResult(metrics, scored.samples)
