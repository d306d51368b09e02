"""The beginning of a run: the checkpoint's weights, or a step saved by an earlier run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from roll_r3.config.derived import saving_dir
from roll_r3.config.findings.readable import readable
from roll_r3.config.findings.report import show_value
from roll_r3.config.findings.write_errors import CANNOT_CREATE
from roll_r3.config.load import MAX_BYTES
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.disk import is_directory, read_at_most
from roll_r3.config.reading.yaml_file import parse_yaml, to_yaml
from roll_r3.config.sections import CheckpointConfig
from roll_r3.config.tree import join
from roll_r3.data.draws import NOWHERE, Place, PromptSource, prompt_source
from roll_r3.data.prompts import Prompt
from roll_r3.errors import BusyError, CheckpointError, ConfigError
from roll_r3.pipelines.lifecycle.checkpoints import stores_of
from roll_r3.pipelines.lifecycle.places import placed
from roll_r3.saving.manifest import verify, write_durably
from roll_r3.saving.state import CONFIG, METRICS, Data, RunState, fingerprint, read_state
from roll_r3.saving.store import CHECKPOINTS, Store, mark_newest, newest_run, runs_saved
from roll_r3.tracking.metric_log import evaluated_steps
from roll_r3.tracking.progress import Progress
from roll_r3.tracking.run_dir import RunDir

_MAX_METRICS = 1 << 30
EVALUATIONS = "evaluations"
"""Directory of an experiment for evaluations without training."""
_NAMED = 5
"""Number of runs listed by a message."""
COMPARING = "comparing the checkpoint with its checksums"
"""Name of a stage that reads a whole checkpoint: hours for terabytes on a slow disk."""


@dataclass(frozen=True)
class ResumePoint:
    """Point to resume a run from."""

    checkpoint: Path
    """Whole: every byte of it was compared with its checksum."""
    state: RunState


@contextmanager
def opened(config: RLVRConfig, now: datetime, progress: Progress) -> Iterator[tuple[RunDir, ResumePoint | None]]:
    """Lock the directory of the run, and find the point to resume from; None: start from `pretrain`.

    A run to resume is inspected under the lock: a process about to exit may save once more.

    Args:
        progress: takes a line about the point found, and about every damaged checkpoint before it.

    Raises:
        ConfigError: the named checkpoint is not one, or is damaged; the directory cannot be made.
        BusyError: another process runs there.
        CheckpointError: there are checkpoints to resume from, and all are damaged.
    """
    named, run = None, None
    experiment = Path(saving_dir(config)).absolute() / config.exp_name
    if config.resume_from_checkpoint == "auto":
        run = newest_run(experiment)
        if run is None:
            progress.say(
                f"resume_from_checkpoint: auto: no run in {experiment} has a checkpoint, starting from "
                f"{config.pretrain}"
            )
    elif config.resume_from_checkpoint != "off":
        path = Path(os.path.realpath(config.resume_from_checkpoint))  # `latest` is a link
        if is_directory(path / CHECKPOINTS) and path.parent == Path(os.path.realpath(experiment)):
            run = path.name
        else:
            with progress.stage(COMPARING):
                named = _named(path, progress.say)
    run_dir = _directory(config, now, run)
    with ExitStack() as stack:
        try:
            stack.enter_context(run_dir.locked(progress.say))
        except BusyError as error:
            raise BusyError(f"{error}{_others(experiment, run)}") from error
        mark_newest(run_dir.saved)
        yield run_dir, named if run is None else newest_point(run_dir, progress)


@contextmanager
def opened_for_evaluation(
    config: RLVRConfig, now: datetime, progress: Progress
) -> Iterator[tuple[RunDir, ResumePoint | None]]:
    """Lock a new directory below `evaluations/` of the experiment, and find the checkpoint; None: `pretrain`.

    The run with the checkpoint stays as it is.

    Raises:
        ConfigError: as `opened`; or resume_from_checkpoint is auto and no run has a checkpoint.
    """
    point, named = None, config.resume_from_checkpoint
    if named == "auto":
        experiment = Path(saving_dir(config)).absolute() / config.exp_name
        run = newest_run(experiment)
        if run is None:
            raise ConfigError(f"resume_from_checkpoint: auto: no run in {experiment} has a checkpoint to evaluate")
        named = str(experiment / run)
    if named != "off":
        with progress.stage(COMPARING):
            point = _named(Path(os.path.realpath(named)), progress.say)
    folder = f"{config.exp_name}/{EVALUATIONS}"
    run_dir = _directory(
        config.model_copy(update={"exp_name": folder, "checkpoint_config": CheckpointConfig()}), now, None
    )
    with run_dir.locked(progress.say):
        yield run_dir, point


def _directory(config: RLVRConfig, now: datetime, run: str | None) -> RunDir:
    """Return a new directory, or that of the run to resume."""
    where, saving = (config.output_dir, config.exp_name), saving_dir(config)
    try:
        if run is not None:
            return RunDir.reopen(*where, run, saving_dir=saving)
        return RunDir.create(*where, now, saving_dir=saving)
    except OSError as error:
        if error.errno not in CANNOT_CREATE:
            raise
        raise ConfigError(
            f"output_dir: {config.output_dir}: the run's directory cannot be made: {error}; name a directory that can "
            "be made and written"
            + (f" (checkpoint_config.output_dir is {saving})" if saving != config.output_dir else "")
        ) from error


def _others(experiment: Path, busy: str | None) -> str:
    """List runs to resume instead of one that another process runs."""
    others = [name for name in runs_saved(experiment) if name != busy]
    if not others:
        return ""
    return (
        "\nTo go on with another run of the experiment, name its directory, as in resume_from_checkpoint: "
        f"{experiment / others[-1]} ({len(others)} with checkpoints: {', '.join(others[-_NAMED:])})"
    )


def _named(path: Path, say: Callable[[str], None]) -> ResumePoint:
    """A checkpoint, or the newest whole one of a run."""
    try:
        if is_directory(path / CHECKPOINTS):
            newest = Store(path / CHECKPOINTS).newest_intact(say)
            if newest is None:
                raise CheckpointError("it is a run without a checkpoint")
            return ResumePoint(newest, read_state(newest))
        verify(path)
        return ResumePoint(path, read_state(path))
    except CheckpointError as error:
        raise ConfigError(f"resume_from_checkpoint: {path} cannot be resumed: {error}") from error


def newest_point(run_dir: RunDir, progress: Progress) -> ResumePoint | None:
    """Return the newest whole checkpoint of a run locked by this process; None: it has none.

    Raises:
        CheckpointError: it has some, and all are damaged.
    """
    try:
        with progress.stage(COMPARING):
            newest = stores_of(run_dir)[0].newest_intact(progress.say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: the run does not start over by itself. Name another checkpoint in resume_from_checkpoint, or "
            "write off"
        ) from error
    return None if newest is None else ResumePoint(newest, read_state(newest))


def rewind(run_dir: RunDir, point: ResumePoint | None, say: Callable[[str], None]) -> None:
    """Rewind the run's files to the step to resume after; later steps are done again.

    Results of later steps, damaged checkpoints and exports are renamed.

    Args:
        point: None: the run begins again.
    """
    done = point.state.step if point else 0
    checkpoints, exports = stores_of(run_dir)
    saved = _metrics_of(point.checkpoint) if point else ""
    metrics = saved + _evaluation_after(run_dir.metrics_file, done, saved)
    replace_file(run_dir.metrics_file, metrics)
    for aside in checkpoints.set_aside_after(done, "damaged"):
        say(f"what is left of a damaged checkpoint is in {aside}")
    for aside in exports.set_aside_after(done, "earlier"):
        say(f"weights of a step that is done again are in {aside}")
    if run_dir.samples_file.is_file():
        replace_file(run_dir.samples_file, "".join(_until(run_dir.samples_file, done)))
    if run_dir.validation_file.is_file():
        last = done if evaluated_steps(metrics) & {done} else done - 1
        replace_file(run_dir.validation_file, "".join(_until(run_dir.validation_file, last)))


def _evaluation_after(metrics: Path, step: int, saved: str) -> str:
    """Return the line of a step's evaluation, made after its checkpoint; empty if there is none, or it is saved."""
    if not metrics.is_file() or step in evaluated_steps(saved):
        return ""
    lines = metrics.read_text(errors="replace").splitlines(keepends=True)
    return next((line for line in reversed(lines) if line.endswith("\n") and step in evaluated_steps(line)), "")


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    write_durably(partial, text)
    partial.replace(path)


def _until(samples: Path, step: int) -> list[str]:
    """The lines of samples.jsonl up to a step; the last line may be cut off."""
    kept = []
    with samples.open(errors="replace", newline="\n") as lines:  # what a model says may hold what else ends a line
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return kept


def _metrics_of(checkpoint: Path) -> str:
    """The metrics of a checkpoint's steps, as they were written.

    Raises:
        CheckpointError: they are not there, or are something else.
    """
    path = checkpoint / METRICS
    try:
        text = read_at_most(path, _MAX_METRICS).decode()
        for line in text.splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.pop("step", None)) is not int:
                raise ValueError("a line is not of a step")
            if not all(value is None or type(value) in (int, float) for value in row.values()):
                raise ValueError("a metric is not a number")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold the metrics of the run so far: {error}") from error
    return text


def changes(config: RLVRConfig, point: ResumePoint) -> list[str]:
    """Return the fields that differ from the run so far, with both values.

    Raises:
        CheckpointError: the checkpoint does not hold the earlier values.
    """
    path = point.checkpoint / CONFIG
    try:
        earlier = parse_yaml(read_at_most(path, MAX_BYTES).decode(), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if earlier.findings:
        raise CheckpointError(f"{path} cannot be read: {earlier.findings[0].why}")
    before, after = _flat(earlier.value), _flat(parse_yaml(to_yaml(config), "this run").value)
    paths = [path for path in before | after if before.get(path) != after.get(path)]
    return [
        f"  {readable(path)}: {_shown(before, path)} -> {_shown(after, path)}"
        for path in paths
        if path != "resume_from_checkpoint"
    ]


def _shown(values: dict[str, Any], path: str) -> str:
    return show_value(values[path]) if path in values else "not there"


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for name, inner in node.items() for k, v in _flat(inner, join(path, str(name))).items()}


def data_of(prompts: Sequence[Prompt], seed: int, place: Place = NOWHERE) -> Data:
    """Return these prompts as the data of a run, with its place there."""
    sha256 = fingerprint([(p.token_ids, p.ground_truth, p.domain) for p in prompts])
    return placed(Data(prompts=len(prompts), sha256=sha256, seed=seed, drawn=()), place)


def source_of(
    config: RLVRConfig, prompts: Sequence[Prompt], section_of: Callable[[str], str], place: Place = NOWHERE
) -> PromptSource:
    """Return the prompts of a run as its steps draw them, at a place.

    Args:
        section_of: section of `rewards` of a domain.

    Raises:
        ConfigError: a section of domain_interleave_probs has no prompts; or finding the place would take too long.
    """
    shares = config.actor_train.data_args.domain_interleave_probs
    return prompt_source(
        prompts, config.rollout_batch_size, config.seed, shares=shares, section_of=section_of, place=place
    )
