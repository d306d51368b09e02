"""Writing of checkpoints to resume from, and of weights for transformers."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from roll_r3.cluster.models import ModelGroup
from roll_r3.config.findings.write_errors import disk_of, explain
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.data.draws import Place
from roll_r3.errors import CheckpointError, LostWorkerError, RollError
from roll_r3.pipelines.lifecycle.places import placed
from roll_r3.pipelines.lifecycle.shutdown import GracefulExit, ImmediateExit, Shutdown
from roll_r3.saving.manifest import EVERY_NODE, FileSum, file_sum, files_below, write_durably
from roll_r3.saving.state import CONFIG, METRICS, STATE, TRAINER, Data, RunState
from roll_r3.saving.store import CHECKPOINTS, EXPORTS, Store
from roll_r3.tracking.run_dir import RunDir

logger = logging.getLogger(__name__)


def stores_of(run_dir: RunDir) -> tuple[Store, Store]:
    """Return the stores of a run's checkpoints and of its weights for transformers."""
    return Store(run_dir.saved / CHECKPOINTS), Store(run_dir.saved / EXPORTS)


def is_due(step: int, every: int, last: int) -> bool:
    """Return True if an action is due after a step: every `every` steps and after the last; 0: never."""
    return every > 0 and (step % every == 0 or step == last)


def lacks_export(config: RLVRConfig, run_dir: RunDir, step: int) -> bool:
    """Return True if a run has saved a step without exporting its weights, though both were due."""
    checkpoints, exports = stores_of(run_dir)
    due = is_due(step, config.save_hf_steps, config.max_steps)
    return due and checkpoints.path(step).exists() and not exports.path(step).exists()


def try_saving(config: RLVRConfig, run_dir: RunDir) -> None:
    """Check before the first step that checkpoints can be saved.

    Raises:
        CheckpointError: they cannot.
    """
    checkpoints, exports = stores_of(run_dir)
    store = checkpoints if config.save_steps else exports if config.save_hf_steps else None
    if store is None:
        return
    try:
        store.try_out()
    except OSError as error:
        raise CheckpointError(
            f"nothing could be saved in {store.folder}, so no step is made. A trial failed: {explain(error)}"
        ) from error


class Checkpoints:
    """Saves the steps of a run that are due, one after the other.

    A checkpoint is written in a thread beside the run. With `checkpoint_config.async_save` the run waits for it before
    the next one and at the end, which may be an error. Otherwise it waits at once.
    """

    def __init__(
        self,
        config: RLVRConfig,
        run_dir: RunDir,
        trainer: ModelGroup,
        *,
        data: Data,
        begun: int,
        shutdown: Shutdown,
        say: Callable[[str], None],
    ) -> None:
        """Args:
        data: prompts of the run.
        shutdown: lets a SIGTERM wait for a checkpoint under way while an error ends the run.
        say: takes a line for everything saved, from the writing thread.
        """
        self._config, self._run_dir, self._trainer = config, run_dir, trainer
        self._data, self._begun = data, begun
        self._shutdown, self._say = shutdown, say
        self._checkpoints, self._exports = stores_of(run_dir)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the checkpoint under way, except on an immediate exit. Of two errors the first is raised, and the
        other is reported.
        """
        self._writer.shutdown(wait=False)
        if isinstance(error, ImmediateExit | KeyboardInterrupt):
            return
        if error is not None and self._under_way is not None and not self._under_way.done():
            self._say("the checkpoint that is being written is completed first")
        try:
            with self._shutdown.held():
                self.wait()
        except GracefulExit:
            if error is None:  # else the handler of the error sees the SIGTERM
                raise
        except RollError as failure:
            if error is None:
                raise
            self._say(str(failure))

    def step_done(self, step: int, samples_seen: int, place: Place) -> None:
        """Save everything due after a step with written metrics.

        Args:
            place: place in the prompts after the step.

        Raises:
            CheckpointError: something could not be written, now or since the step before, for want of space for
                instance. Earlier checkpoints are unchanged.
        """
        start = time.perf_counter()
        if self._under_way is not None and self._under_way.done():
            self.wait()
        if self._is_due(step, self._config.save_steps):
            self.wait()
            self._begin(step, samples_seen, place)
            if not self._config.checkpoint_config.async_save:
                self.wait()
        if self._is_due(step, self._config.save_hf_steps):
            self.wait()
            self._export(step)
        self._seconds += time.perf_counter() - start

    def catch_up(self, step: int) -> None:
        """Export the weights of the step to resume after, if the run ended between its checkpoint and its export.

        Raises:
            CheckpointError: as `step_done`.
        """
        if lacks_export(self._config, self._run_dir, step):
            self._export(step)

    def leave(self, step: int, samples_seen: int, place: Place) -> None:
        """Save the last step before an exit, unless it is saved or saving is off, and wait for it.

        Raises:
            CheckpointError: as `step_done`.
        """
        self.wait()
        if self._config.save_steps == 0:
            self._say("nothing is saved: save_steps is 0")
        elif step > self._begun and not self._checkpoints.path(step).exists():
            self._begin(step, samples_seen, place)
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint under way, if there is one, is there. Raises as `step_done`."""
        if self._under_way is None:
            return
        try:
            self._under_way.result()
        finally:
            if self._under_way.done():  # a signal may end the waiting before
                self._under_way = None

    def seconds_waited(self) -> float:
        """Return the seconds that `step_done` kept the run since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _is_due(self, step: int, every: int) -> bool:
        return is_due(step, every, self._config.max_steps)

    def _export(self, step: int) -> None:
        began = time.perf_counter()
        with self._abandoned_on_failure(self._exports, step):
            folder = self._exports.begin(step)
            written = self._trainer.save_hf(folder)
            if written != {name: (folder / name).stat().st_size for name in files_below(folder)}:
                raise CheckpointError(f"{folder} does not hold what the trainer's first rank wrote there: {EVERY_NODE}")
            self._finished(self._exports, step, began)

    def _begin(self, step: int, samples_seen: int, place: Place) -> None:
        """Keep the state of the step, and have the rest of the checkpoint written."""
        began = time.perf_counter()
        logger.info("step %d: saving", step)
        with self._abandoned_on_failure(self._checkpoints, step):
            folder = self._checkpoints.begin(step)
            sums = self._write_own(folder, step, samples_seen, place)
            self._trainer.take_snapshot()
        self._under_way = self._writer.submit(self._complete, folder, step, sums, began)

    def _complete(self, folder: Path, step: int, sums: dict[str, FileSum], began: float) -> None:
        """Write, in the writer's thread, everything that the run need not wait for."""
        with self._abandoned_on_failure(self._checkpoints, step):
            written = self._trainer.write_snapshot(folder / TRAINER)
            self._checkpoints.seal(step, sums | {f"{TRAINER}/{name}": found for name, found in written.items()})
            self._finished(self._checkpoints, step, began)
        try:
            self._checkpoints.keep(self._config.max_ckpt_to_keep)
        except OSError as error:  # it takes space, and the next save tries again: no reason to end a run
            self._say(f"an older checkpoint could not be removed: {error}")

    def _finished(self, store: Store, step: int, began: float) -> None:
        self._say(f"saved {store.finish(step)} in {time.perf_counter() - began:.1f} s")

    @contextmanager
    def _abandoned_on_failure(self, store: Store, step: int) -> Iterator[None]:
        try:
            yield
        except LostWorkerError:
            store.abandon(step)
            raise
        except (OSError, RollError) as error:
            disk = disk_of(store.folder)  # before there is space again
            store.abandon(step)
            what = f"step {step} was not saved" if store is self._checkpoints else f"step {step} was not exported"
            left = ", ".join(f"step {s}" for s in self._checkpoints.steps()) or "nothing"
            raise CheckpointError(
                f"{what}: {error}\nthe run stops here; in {self._checkpoints.folder} there is {left}, and "
                f"resume_from_checkpoint: auto goes on from the newest checkpoint (disk: {disk})"
            ) from error

    def _write_own(self, folder: Path, step: int, samples_seen: int, place: Place) -> dict[str, FileSum]:
        """The driver's part of a checkpoint; checksums by name."""
        state = RunState(
            step=step,
            samples_seen=samples_seen,
            trainer=self._config.actor_train.strategy_args.strategy_name,
            data=placed(self._data, place),
        )
        write_durably(folder / STATE, state.text())
        write_durably(folder / CONFIG, to_yaml(self._config))
        shutil.copyfile(self._run_dir.metrics_file, folder / METRICS)
        return {name: file_sum(folder / name) for name in (STATE, CONFIG, METRICS)}
