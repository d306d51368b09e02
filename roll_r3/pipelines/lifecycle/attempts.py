"""The starts of a run: one as a rule, and another from the newest checkpoint when a worker or its node was lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from roll_r3.cluster.placement import place
from roll_r3.cluster.ray_session import ray_cluster
from roll_r3.cluster.roles import Roles
from roll_r3.config.findings.write_errors import with_filename
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.draws import NOWHERE
from roll_r3.data.evaluation_sets import EvaluationSet
from roll_r3.data.prompts import Prompt
from roll_r3.errors import ConfigError, EngineError, LostWorkerError, WorkerError
from roll_r3.pipelines.evaluation import Evaluation, evaluation_due
from roll_r3.pipelines.experience import Experience, ScoredSample
from roll_r3.pipelines.lifecycle.checkpoints import Checkpoints
from roll_r3.pipelines.lifecycle.places import place_of
from roll_r3.pipelines.lifecycle.recovery import Recoveries
from roll_r3.pipelines.lifecycle.resume import ResumePoint, data_of, newest_point, rewind, source_of
from roll_r3.pipelines.lifecycle.shutdown import GracefulExit, Shutdown
from roll_r3.pipelines.rlvr import RLVRPipeline
from roll_r3.rewards.scoring import Rewards
from roll_r3.saving.state import TRAINER
from roll_r3.tracking.metric_log import MetricLog, last_step
from roll_r3.tracking.progress import Progress
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.trackers.libraries import without_secrets

logger = logging.getLogger(__name__)


_SHOWN_SAMPLES = 100
"""Most samples of an evaluation shown by trackers; validation.jsonl has all."""


@dataclass(frozen=True)
class Finished:
    """Summary of a run after its last step."""

    history: list[dict[str, float]]
    """Metrics of every step, as far as the summary needs them."""
    first: list[ScoredSample]
    """Samples of the first step of the last attempt."""
    last: list[ScoredSample]
    evaluations: dict[int, dict[str, float]]
    """Step -> metrics of its evaluation."""


class Attempts:
    """Everything that the attempts of one run have in common."""

    def __init__(
        self,
        config: RLVRConfig,
        *,
        run_dir: RunDir,
        tokenizer: Any,
        prompts: list[Prompt],
        rewards: Rewards,
        progress: Progress,
        shutdown: Shutdown,
        evaluation_sets: Sequence[EvaluationSet] = (),
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._tokenizer, self._prompts, self._rewards = tokenizer, prompts, rewards
        self._evaluation_sets = evaluation_sets
        self._progress, self._shutdown = progress, shutdown
        self._device_kind: str | None = None
        """"cuda" or "cpu" once a start found out: a later one takes the same or none."""

    def run(self, begin: ResumePoint | None) -> Finished:
        """Run every step after those of `begin`, in as many attempts as faults of the cluster make necessary.

        Raises:
            LostWorkerError: a worker was lost, and another attempt is useless (see `Recoveries`).
            RollError: another attempt would not help.
            GracefulExit: SIGTERM came; everything due is saved.
        """
        say, point = self._progress.say, begin
        recoveries = Recoveries(self._config.max_recoveries, begin.state.step if begin else 0)
        while True:
            judged, useless = None, None
            try:
                with ExitStack() as stack:
                    try:
                        return self._start(point, stack)
                    except LostWorkerError as error:
                        # before the rest is taken down, which may take a while
                        judged, useless = error, self._judged(error, recoveries)
                        raise
            except LostWorkerError as error:
                if judged is None:  # Ray's own error, which is known as a loss by now
                    useless = self._judged(error, recoveries)
                if useless is error:
                    raise
                if useless is not None:
                    raise useless from error
            point = newest_point(self._run_dir, self._progress) or begin
            rewind(self._run_dir, point, say)
            begins = "starting again from the beginning"
            if point is not None:
                begins = f"resuming after step {point.state.step}, from {point.checkpoint}"
            say(f"{begins} (restart {recoveries.count} of at most {self._config.max_recoveries})")

    def _judged(self, error: LostWorkerError, recoveries: Recoveries) -> LostWorkerError | None:
        """Report the loss if another attempt is useful; otherwise return the reason against one.

        Raises:
            GracefulExit: SIGTERM came.
        """
        if self._shutdown.asked:  # the same signal may have ended its workers too
            self._progress.say(f"LOST: {error}\nleaving without another checkpoint")
            raise GracefulExit from error
        try:
            recoveries.spend(error, last_step(self._run_dir.metrics_file))
        except LostWorkerError as useless:
            return useless
        logger.exception("start %d after a loss", recoveries.count)
        self._progress.say(f"LOST: {error}")
        return None

    def evaluate(self, point: ResumePoint | None) -> Evaluation:
        """Evaluate the weights of `point`, or those of `pretrain`, once, and train nothing.

        Raises:
            RollError: as `run`. A lost worker ends it too.
            GracefulExit: SIGTERM came.
        """
        done = point.state.step if point else 0
        with ExitStack() as stack, self._shutdown.as_raised():
            _, pipeline = self._bring_up(point, stack)
            log = stack.enter_context(self._metric_log())
            return self._evaluate(pipeline, done, log)

    def _start(self, point: ResumePoint | None, stack: ExitStack) -> Finished:
        """Bring everything up, go on from `point`; `stack` takes everything down again."""
        config, run_dir = self._config, self._run_dir
        done = point.state.step if point else 0
        data = data_of(self._prompts, config.seed)
        roles, pipeline = self._bring_up(point, stack)
        log = stack.enter_context(self._metric_log())
        shutdown, say = self._shutdown, self._progress.say
        saving = stack.enter_context(
            Checkpoints(config, run_dir, roles.trainer, data=data, begun=done, shutdown=shutdown, say=say)
        )
        if done:
            saving.catch_up(done)
        shown = self._steps(pipeline, done, log, saving)
        return Finished(log.history, *shown, log.evaluations)

    def _metric_log(self) -> MetricLog:
        config = self._config
        return MetricLog(
            self._run_dir,
            config.track_with,
            kwargs=config.tracker_kwargs,
            config=without_secrets(config),
            say=self._progress.say,
        )

    def _bring_up(self, point: ResumePoint | None, stack: ExitStack) -> tuple[Roles, RLVRPipeline]:
        """Start the cluster with the weights of `point`, in the engines too; `stack` takes it down again."""
        config, progress, run_dir = self._config, self._progress, self._run_dir
        again = self._device_kind is not None
        begun = place_of(point.state.data) if point else NOWHERE
        prompts = source_of(config, self._prompts, self._rewards.section_of, begun)
        with progress.stage("starting Ray"):
            stack.enter_context(ray_cluster(config, progress.say))
            placement = stack.enter_context(place(config, again=self._device_kind))
        self._device_kind = placement.kind
        self._shutdown.raise_if_asked()
        with _lost_if(again):
            roles = stack.enter_context(
                Roles(config, placement, run_dir.log_dir, self._shutdown.unbroken, progress.say)
            )
        engine, ranks = config.actor_infer.strategy_args.strategy_name, len(config.actor_train.device_mapping)
        with progress.stage(f"starting {engine} and {ranks} training ranks on {placement.kind}"), _lost_if(again):
            roles.start()
        self._shutdown.raise_if_asked()
        if point is not None:
            with progress.stage("reading the checkpoint"), _lost_if(again):
                roles.trainer.load_checkpoint(point.checkpoint / TRAINER)
        pipeline = RLVRPipeline(
            config,
            prompts=prompts,
            decoder=self._tokenizer,
            rewards=self._rewards,
            rollout=roles.rollout,
            trainer=roles.trainer,
            reference=roles.reference,
            progress=progress,
            evaluation_sets=self._evaluation_sets,
        )
        done, samples_seen = (point.state.step, point.state.samples_seen) if point else (0, 0)
        with progress.stage("sending the first weights"), _lost_if(again):
            pipeline.start(done=done, samples_seen=samples_seen)
        self._shutdown.raise_if_asked()
        return roles, pipeline

    def _steps(
        self, pipeline: RLVRPipeline, done: int, log: MetricLog, saving: Checkpoints
    ) -> tuple[list[ScoredSample], list[ScoredSample]]:
        """Every step after the first `done`; the samples shown of the first of them and of the last."""
        before: list[ScoredSample] = []
        shown: list[ScoredSample] = []
        path = self._run_dir.samples_file
        with with_filename(path), path.open("a") as samples_file:
            try:
                with self._shutdown.as_raised():
                    self._evaluate_if_due(pipeline, done, log)
                    for step in range(done + 1, self._config.max_steps + 1):
                        experience = pipeline.sample(step)
                        with self._shutdown.held():
                            shown = self._learn(pipeline, experience, log, saving, samples_file)
                            before, done = before or shown, step
                        del experience  # else its routes would lie in the object store while the next step is sampled
                        self._evaluate_if_due(pipeline, step, log)
                    with self._shutdown.held():
                        saving.wait()  # the last checkpoint, too, is whole before a SIGTERM ends who writes it
            except GracefulExit:
                self._progress.say(f"SIGTERM: leaving after step {done}")
                with self._shutdown.held():
                    saving.leave(done, pipeline.samples_seen, pipeline.place)
        return before, shown

    def _evaluate_if_due(self, pipeline: RLVRPipeline, step: int, log: MetricLog) -> None:
        """Evaluate the weights after a step, unless a resumed run has their evaluation."""
        if evaluation_due(self._config, step) and step not in log.evaluations:
            self._evaluate(pipeline, step, log)

    def _evaluate(self, pipeline: RLVRPipeline, step: int, log: MetricLog) -> Evaluation:
        """Evaluate, and write the samples, then the metrics: a resumed run repeats an evaluation without metrics."""
        evaluation = pipeline.evaluate(step)
        path = self._run_dir.validation_file
        with self._shutdown.held():
            with with_filename(path), path.open("a") as stream:
                for sample in evaluation.samples:
                    stream.write(json.dumps({"step": step} | asdict(sample), ensure_ascii=False) + "\n")
            log.write_evaluation(step, evaluation.metrics)
            log.write_samples(step, "val/samples", [asdict(sample) for sample in evaluation.samples[:_SHOWN_SAMPLES]])
        return evaluation

    def _learn(
        self, pipeline: RLVRPipeline, experience: Experience, log: MetricLog, saving: Checkpoints, samples_file: TextIO
    ) -> list[ScoredSample]:
        """Run the second half of a step and everything after it; return the samples to show."""
        step, result = experience.step, pipeline.learn(experience)
        log.write(step, result.metrics | {"time/step_save": saving.seconds_waited()})
        # one sample of each of the first prompts says more than all samples of one prompt
        group = self._config.num_return_sequences_in_group
        shown = result.samples[::group][: self._config.num_logged_samples]
        for sample in shown:
            samples_file.write(json.dumps({"step": step} | asdict(sample), ensure_ascii=False) + "\n")
        samples_file.flush()
        log.write_samples(step, "samples", [asdict(sample) for sample in shown])
        self._progress.step_done(step, result.metrics)
        saving.step_done(step, pipeline.samples_seen, pipeline.place)
        return shown


@contextmanager
def _lost_if(again: bool) -> Iterator[None]:
    """Treat a failed start as a loss in a later attempt: the same things came up before.

    Raises:
        LostWorkerError: in place of an error of a worker, an engine or their places, in a later attempt.
    """
    try:
        yield
    except (WorkerError, EngineError, ConfigError) as error:
        if not again or isinstance(error, LostWorkerError):
            raise
        raise LostWorkerError(f"it started before, and did not start again: {error}") from error
