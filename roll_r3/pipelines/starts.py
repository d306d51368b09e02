"""The starts of a run: one as a rule, and another from the newest checkpoint when a worker or its node was lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from roll_r3.cluster.groups import Roles
from roll_r3.cluster.placement import place
from roll_r3.cluster.session import ray_cluster
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.writing import naming
from roll_r3.data.prompts import Prompt, prompt_batches
from roll_r3.errors import ConfigError, EngineError, LostWorkerError, WorkerError
from roll_r3.pipelines.checkpoints import Checkpoints
from roll_r3.pipelines.leaving import Leave, Leaving
from roll_r3.pipelines.recovery import Recoveries
from roll_r3.pipelines.resume import ResumePoint, data_of, newest_point, put_back
from roll_r3.pipelines.rlvr import Experience, RLVRPipeline, ScoredSample
from roll_r3.rewards.scoring import Rewards
from roll_r3.saving.state import TRAINER
from roll_r3.tracking.metric_log import MetricLog, last_step
from roll_r3.tracking.progress import Progress
from roll_r3.tracking.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What is left to show of a run whose steps are all done."""

    history: list[dict[str, float]]
    """What the summary needs of every step's metrics."""
    first: list[ScoredSample]
    """Samples of the first step that the last start made."""
    last: list[ScoredSample]


class Starts:
    """Everything that the starts of one run have in common."""

    def __init__(
        self,
        config: RLVRConfig,
        *,
        run_dir: RunDir,
        tokenizer: Any,
        prompts: list[Prompt],
        rewards: Rewards,
        progress: Progress,
        leaving: Leaving,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._tokenizer, self._prompts, self._rewards = tokenizer, prompts, rewards
        self._progress, self._leaving = progress, leaving
        self._device_kind: str | None = None
        """"cuda" or "cpu" once a start found out: a later one takes the same or none."""

    def run(self, begin: ResumePoint | None) -> Finished:
        """Every step after those of `begin`, in as many starts as the faults of the cluster make of it.

        Raises:
            LostWorkerError: a worker was lost, and a new start is of no use (see `Recoveries`).
            RollError: what no new start would mend.
            Leave: SIGTERM; what is to be saved is saved.
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
            put_back(self._run_dir, point, say)
            where = f"after step {point.state.step}, from {point.checkpoint}" if point else "from the beginning"
            say(f"going on {where} (new start {recoveries.count} of at most {self._config.max_recoveries})")

    def _judged(self, error: LostWorkerError, recoveries: Recoveries) -> LostWorkerError | None:
        """Say what was lost, where a new start is of use; else return why none is.

        Raises:
            Leave: SIGTERM came.
        """
        if self._leaving.asked:  # whoever ends the run may have ended its workers too
            self._progress.say(f"LOST: {error}\nleaving without another checkpoint")
            raise Leave from error
        try:
            recoveries.spend(error, last_step(self._run_dir.metrics_file))
        except LostWorkerError as useless:
            return useless
        logger.exception("start %d after a loss", recoveries.count)
        self._progress.say(f"LOST: {error}")
        return None

    def _start(self, point: ResumePoint | None, stack: ExitStack) -> Finished:
        """Bring everything up, go on from `point`; `stack` takes everything down again."""
        config, progress, run_dir = self._config, self._progress, self._run_dir
        done = point.state.step if point else 0
        again = self._device_kind is not None
        data = data_of(self._prompts, config.seed, point.state.data.drawn if point else ())
        batches = prompt_batches(self._prompts, config.rollout_batch_size, config.seed, drawn=data.drawn)
        with progress.stage("starting Ray"):
            stack.enter_context(ray_cluster(config, progress.say))
            placement = stack.enter_context(place(config, again=self._device_kind))
        self._device_kind = placement.kind
        with _lost_if(again):
            roles = stack.enter_context(Roles(config, placement, run_dir.log_dir, self._leaving.unbroken, progress.say))
        engine, ranks = config.actor_infer.strategy_args.strategy_name, len(config.actor_train.device_mapping)
        with progress.stage(f"starting {engine} and {ranks} training ranks on {placement.kind}"), _lost_if(again):
            roles.start()
        if point is not None:
            with progress.stage("reading the checkpoint"), _lost_if(again):
                roles.trainer.load_checkpoint(point.checkpoint / TRAINER)
        pipeline = RLVRPipeline(
            config,
            prompts=batches,
            decoder=self._tokenizer,
            rewards=self._rewards,
            rollout=roles.rollout,
            trainer=roles.trainer,
            reference=roles.reference,
            progress=progress,
        )
        log = stack.enter_context(MetricLog(run_dir, config.track_with))
        with progress.stage("sending the first weights"), _lost_if(again):
            pipeline.start(done=done, samples_seen=point.state.samples_seen if point else 0)
        leaving, say = self._leaving, progress.say
        saving = stack.enter_context(
            Checkpoints(config, run_dir, roles.trainer, data=data, begun=done, leaving=leaving, say=say)
        )
        if done:
            saving.catch_up(done)
        shown = self._steps(pipeline, done, log, saving)
        return Finished(log.history, *shown)

    def _steps(
        self, pipeline: RLVRPipeline, done: int, log: MetricLog, saving: Checkpoints
    ) -> tuple[list[ScoredSample], list[ScoredSample]]:
        """Every step after the first `done`; the samples shown of the first of them and of the last."""
        before: list[ScoredSample] = []
        shown: list[ScoredSample] = []
        path = self._run_dir.samples_file
        with naming(path), path.open("a") as samples_file:
            try:
                with self._leaving.as_raised():
                    for step in range(done + 1, self._config.max_steps + 1):
                        experience = pipeline.sample(step)
                        with self._leaving.held():
                            shown = self._learn(pipeline, experience, log, saving, samples_file)
                            before, done = before or shown, step
                        del experience  # else its routes would lie in the object store while the next step is sampled
                    with self._leaving.held():
                        saving.wait()  # the last checkpoint, too, is whole before a SIGTERM ends who writes it
            except Leave:
                self._progress.say(f"SIGTERM: leaving after step {done}")
                with self._leaving.held():
                    saving.leave(done, pipeline.samples_seen)
        return before, shown

    def _learn(
        self, pipeline: RLVRPipeline, experience: Experience, log: MetricLog, saving: Checkpoints, samples_file: TextIO
    ) -> list[ScoredSample]:
        """The second half of a step with everything that belongs to it; the samples that are shown of it."""
        step, result = experience.step, pipeline.learn(experience)
        log.write(step, result.metrics | {"time/step_save": saving.seconds_waited()})
        # one sample of each of the first prompts says more than all samples of one prompt
        group = self._config.num_return_sequences_in_group
        shown = result.samples[::group][: self._config.num_logged_samples]
        for sample in shown:
            samples_file.write(json.dumps({"step": step} | asdict(sample), ensure_ascii=False) + "\n")
        samples_file.flush()
        self._progress.step_done(step, result.metrics)
        saving.step_done(step, pipeline.samples_seen)
        return shown


@contextmanager
def _lost_if(again: bool) -> Iterator[None]:
    """What came up before and does not in a new start is nobody's mistake either.

    Raises:
        LostWorkerError: in the place of an error of a worker, an engine or their places, in a new start.
    """
    try:
        yield
    except (WorkerError, EngineError, ConfigError) as error:
        if not again or isinstance(error, LostWorkerError):
            raise
        raise LostWorkerError(f"it started before, and did not start again: {error}") from error
