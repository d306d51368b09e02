"""Writing what a run saves: checkpoints to go on from, and weights for transformers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from roll_r3.cluster.groups import ModelGroup
from roll_r3.config.derived import saving_dir
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.yaml_file import to_yaml
from roll_r3.errors import CheckpointError, LostWorkerError, RollError
from roll_r3.saving.manifest import file_sum, write_durably
from roll_r3.saving.state import CONFIG, METRICS, STATE, TRAINER, Data, RunState
from roll_r3.saving.store import CHECKPOINTS, EXPORTS, Store
from roll_r3.tracking.run_dir import RunDir


def stores_of(config: RLVRConfig, run: str) -> tuple[Store, Store]:
    """Where the checkpoints of a run are, and its weights for transformers."""
    folder = Path(saving_dir(config)).absolute() / config.exp_name / run
    return Store(folder / CHECKPOINTS), Store(folder / EXPORTS)


class Checkpoints:
    """Saves the steps of a run that are due."""

    def __init__(
        self,
        config: RLVRConfig,
        run_dir: RunDir,
        trainer: ModelGroup,
        *,
        data: Data,
        begun: int,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            data: how far the run was in its prompts after step `begun`.
            say: is told of everything that is saved.
        """
        self._config, self._run_dir, self._trainer = config, run_dir, trainer
        self._data, self._begun = data, begun
        self._say = say
        self._checkpoints, self._exports = stores_of(config, run_dir.path.name)

    def step_done(self, step: int, samples_seen: int) -> None:
        """Save what is due after a step whose metrics are written.

        Raises:
            CheckpointError: something could not be written, for want of space for instance; what was saved before is
                as it was.
        """
        if self._is_due(step, self._config.save_steps):
            self._saved(self._checkpoints, step, lambda folder: self._save(folder, step, samples_seen))
            try:
                self._checkpoints.keep(self._config.max_ckpt_to_keep)
            except OSError as error:  # it takes space, and the next save tries again: no reason to end a run
                self._say(f"an older checkpoint could not be removed: {error}")
        if self._is_due(step, self._config.save_hf_steps):
            self._saved(self._exports, step, self._trainer.save_hf)

    def leave(self, step: int, samples_seen: int) -> None:
        """Save a step that the run is left after, unless it is saved or no step is to be.

        Raises:
            CheckpointError: as `step_done`.
        """
        if self._config.save_steps == 0:
            self._say("nothing is saved: save_steps is 0")
        elif step > self._begun and not self._checkpoints.path(step).exists():
            self._saved(self._checkpoints, step, lambda folder: self._save(folder, step, samples_seen))

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self._config.max_steps)

    def _saved(self, store: Store, step: int, write: Callable[[Path], object]) -> None:
        start = time.perf_counter()
        try:
            write(store.begin(step))
            path = store.finish(step)
        except LostWorkerError:
            store.abandon(step)
            raise
        except (OSError, RollError) as error:
            store.abandon(step)
            left = ", ".join(f"step {s}" for s in store.steps()) or "nothing"
            raise CheckpointError(
                f"step {step} was not saved: {error}\nthe run stops here; in {store.folder} there is {left}, and "
                "resume_from_checkpoint: auto goes on from the newest checkpoint"
            ) from error
        self._say(f"saved {path} in {time.perf_counter() - start:.1f} s")

    def _save(self, folder: Path, step: int, samples_seen: int) -> None:
        """Write a checkpoint and seal it."""
        sums = {f"{TRAINER}/{name}": found for name, found in self._trainer.save_checkpoint(folder / TRAINER).items()}
        drawn = [*self._data.drawn, (step - self._begun, self._config.rollout_batch_size)]
        state = RunState(
            step=step,
            samples_seen=samples_seen,
            trainer=self._config.actor_train.strategy_args.strategy_name,
            data=self._data.model_copy(update={"drawn": tuple(_runs(drawn))}),
        )
        write_durably(folder / STATE, state.text())
        write_durably(folder / CONFIG, to_yaml(self._config))
        shutil.copyfile(self._run_dir.metrics_file, folder / METRICS)
        self._checkpoints.seal(step, sums | {name: file_sum(folder / name) for name in (STATE, CONFIG, METRICS)})


def _runs(drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, batches of one size in a row counted together."""
    merged: list[tuple[int, int]] = []
    for batches, size in drawn:
        if merged and merged[-1][1] == size:
            batches += merged.pop()[0]
        merged.append((batches, size))
    return merged
