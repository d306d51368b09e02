"""From a checked configuration to a finished run: one-time reading, directory, attempts, summary."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from roll_r3.cluster.logs import FORMAT
from roll_r3.config.derived import checkpoint_of, sglang, vllm, workers
from roll_r3.config.findings.report import Origins
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.data.draws import unused_sections
from roll_r3.data.evaluation_sets import EvaluationSet, read_evaluation_sets
from roll_r3.data.prompts import Prompt, read_prompts
from roll_r3.errors import ConfigError
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.models.facts import read_facts
from roll_r3.pipelines.evaluation import evaluation_due
from roll_r3.pipelines.lifecycle.attempts import Attempts
from roll_r3.pipelines.lifecycle.checkpoints import lacks_export, try_saving
from roll_r3.pipelines.lifecycle.resume import (
    changes,
    data_of,
    opened,
    opened_for_evaluation,
    replace_file,
    rewind,
    source_of,
)
from roll_r3.pipelines.lifecycle.shutdown import Shutdown
from roll_r3.preflight.check import require_valid
from roll_r3.preflight.surroundings import read_surroundings
from roll_r3.rewards.scoring import Rewards
from roll_r3.rewards.truths import Truth
from roll_r3.saving.state import check_resumable
from roll_r3.tracking.metric_log import evaluated_steps
from roll_r3.tracking.progress import Progress
from roll_r3.tracking.run_dir import RunDir
from roll_r3.tracking.run_log import RunLog, log_threads
from roll_r3.tracking.run_summary import evaluation_table, run_summary

logger = logging.getLogger(__name__)


def launch(config: RLVRConfig, origins: Origins) -> int:
    """Run the whole training.

    Args:
        origins: origins of the configuration's values, for checks that need the downloaded checkpoint.

    Returns:
        The exit status, 0: every step ran.

    Raises:
        RollError: the reason for the run's end, in words for the person who started it.
    """
    started = time.monotonic()
    config = with_absolute_paths(config)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.max_steps))
        shutdown = stack.enter_context(Shutdown(config.sigterm_grace_period))
        run_dir, point = stack.enter_context(opened(config, datetime.now(UTC), progress))
        done = point.state.step if point else 0
        if point is not None and done >= config.max_steps and not _lacks_something(config, run_dir, done):
            progress.say(f"nothing to do: {point.checkpoint} is of step {done}, and max_steps is {config.max_steps}")
            return 0
        _log_driver(run_dir, progress)
        progress.say(f"run directory: {run_dir.path}")
        rewards = stack.enter_context(
            Rewards(config.rewards, config.reward_workers, config.max_failed_rewards, run_dir.log_dir)
        )
        tokenizer, prompts = _prepare(config, origins, rewards, progress)
        source = source_of(config, prompts, rewards.section_of)
        if point is not None:
            data = data_of(prompts, config.seed, source.place)
            check_resumable(point.state, trainer=config.actor_train.strategy_args.strategy_name, data=data)
            changed = changes(config, point)
            rewind(run_dir, point, progress.say)
            progress.say(f"resuming after step {point.state.step}, from {point.checkpoint}")
            for change in changed:
                progress.say(change)
        replace_file(run_dir.path / "config.yaml", to_yaml(config))
        try_saving(config, run_dir)
        attempts = _attempts(config, run_dir, tokenizer, prompts, rewards, progress, shutdown)
        finished = attempts.run(point)
    summary = run_summary(
        run_dir.path,
        finished.history,
        finished.first,
        finished.last,
        evaluations=finished.evaluations,
        replay_mode=config.actor_train.router_replay.mode,
        seconds=time.monotonic() - started,
    )
    Progress(config.max_steps, sys.stdout).say(summary)  # as `print`, but who reads may be gone
    return 0


def evaluate(config: RLVRConfig, origins: Origins) -> int:
    """Evaluate once, in a directory of its own, and train nothing; print the scores.

    The weights are those of `resume_from_checkpoint`, or of `pretrain` if it is off.

    Args:
        origins: as of `launch`.

    Returns:
        The exit status, 0.

    Raises:
        RollError: the reason for the end, in words for the person who started it.
    """
    config = with_absolute_paths(config)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.max_steps))
        shutdown = stack.enter_context(Shutdown(config.sigterm_grace_period))
        run_dir, point = stack.enter_context(opened_for_evaluation(config, datetime.now(UTC), progress))
        _log_driver(run_dir, progress)
        progress.say(f"directory: {run_dir.path}")
        rewards = stack.enter_context(
            Rewards(config.rewards, config.reward_workers, config.max_failed_rewards, run_dir.log_dir)
        )
        tokenizer, prompts = _prepare(config, origins, rewards, progress)
        if point is not None:
            check_resumable(point.state, trainer=config.actor_train.strategy_args.strategy_name, data=point.state.data)
        replace_file(run_dir.path / "config.yaml", to_yaml(config))
        attempts = _attempts(config, run_dir, tokenizer, prompts, rewards, progress, shutdown)
        evaluation = attempts.evaluate(point)
    weights = point.checkpoint if point else checkpoint_of(config, "actor_train")
    table = evaluation_table(evaluation.metrics)
    Progress(config.max_steps, sys.stdout).say(f"\nevaluation of {weights}\ndirectory {run_dir.path}\n{table}")
    return 0


def _attempts(
    config: RLVRConfig,
    run_dir: RunDir,
    tokenizer: Any,
    prompts: list[Prompt],
    rewards: Rewards,
    progress: Progress,
    shutdown: Shutdown,
) -> Attempts:
    """Read the evaluation's prompts, and return the attempts of a run or of an evaluation."""
    return Attempts(
        config,
        run_dir=run_dir,
        tokenizer=tokenizer,
        prompts=prompts,
        rewards=rewards,
        progress=progress,
        shutdown=shutdown,
        evaluation_sets=_prepare_evaluation(config, tokenizer, rewards, progress),
    )


def _lacks_something(config: RLVRConfig, run_dir: RunDir, step: int) -> bool:
    """Return True if the export or the evaluation of the last step is due and missing."""
    metrics = run_dir.metrics_file.read_text() if run_dir.metrics_file.is_file() else ""
    unevaluated = evaluation_due(config, step) and step not in evaluated_steps(metrics)
    return unevaluated or lacks_export(config, run_dir, step)


def with_absolute_paths(config: RLVRConfig) -> RLVRConfig:
    """Make paths absolute: checkpoints that are directories here, and the engine's interpreter if it is a file here.

    Workers may start in another directory.
    """

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).is_dir() else name

    changes: dict[str, Any] = {"pretrain": absolute(config.pretrain)}
    for role, section in workers(config).items():
        if section.model_args.model_name_or_path:
            name = absolute(section.model_args.model_name_or_path)
            args = section.model_args.model_copy(update={"model_name_or_path": name})
            changes[role] = section.model_copy(update={"model_args": args})
    engine = sglang(config) or vllm(config)
    if (
        engine is not None
        and engine.python
        and Path(engine.python).name != engine.python
        and Path(engine.python).is_file()
    ):
        settings = engine.model_copy(update={"python": str(Path(engine.python).absolute())})
        role = changes.get("actor_infer", config.actor_infer)
        chosen = role.strategy_args.model_copy(update={"strategy_config": settings})
        changes["actor_infer"] = role.model_copy(update={"strategy_args": chosen})
    return config.model_copy(update=changes)


def _prepare(config: RLVRConfig, origins: Origins, rewards: Rewards, progress: Progress) -> tuple[Any, Any]:
    """Check everything that needs no cluster: checkpoint, tokenizer, data, rewards. Starts the rewards' processes."""
    with progress.stage("reading checkpoint, tokenizer, prompts and rewards"):
        checkpoint = resolve_checkpoint(checkpoint_of(config, "actor_train"))
        facts = read_facts(checkpoint)
        require_valid(config, read_surroundings(config), origins)
        tokenizer = _read_tokenizer(checkpoint, config.actor_train.model_args.trust_remote_code)
        prompts = read_prompts(config.actor_train.data_args, tokenizer, config.prompt_length, _told(progress))
        domains = Counter(prompt.domain for prompt in prompts)
        rewards.check_domains(set(domains))
        rewards.wait_until_ready()
        rewards.check_truths(_truths(prompts))
    progress.say(
        f"{facts.model_type}, {len(facts.moe_layers)} MoE layers of {facts.num_layers}, top-{facts.top_k} of "
        f"{facts.num_experts} experts; {len(prompts)} prompts"
    )
    progress.say(rewards.shares(domains))
    shares = config.actor_train.data_args.domain_interleave_probs
    for section, count in unused_sections(prompts, shares, rewards.section_of).items():
        progress.say(f"{count} prompts of {section} are not used: it has no share in domain_interleave_probs")
    return tokenizer, prompts


def _prepare_evaluation(
    config: RLVRConfig, tokenizer: Any, rewards: Rewards, progress: Progress
) -> list[EvaluationSet]:
    """Read and check the prompts of the evaluation, like those of training. Empty without evaluation."""
    if config.validation is None:
        return []
    with progress.stage("reading prompts of the evaluation"):
        sets = read_evaluation_sets(config.validation.data_args, tokenizer, config.prompt_length, _told(progress))
        prompts = [prompt for one in sets for prompt in one.prompts]
        rewards.check_domains({prompt.domain for prompt in prompts})
        rewards.check_truths(_truths(prompts))
    named = ", ".join(f"{one.name} ({len(one.prompts):,} prompts)" for one in sets)
    progress.say(f"evaluation: {named}, {config.validation.val_n_sample} responses each")
    return sets


def _truths(prompts: Iterable[Prompt]) -> Iterator[Truth]:
    return (Truth(p.prompt_id, p.domain, p.ground_truth, p.row) for p in prompts)


def _told(progress: Progress) -> Callable[[str], None]:
    """Lines for the terminal and for the log."""

    def say(text: str) -> None:
        logger.info("%s", text)
        progress.say(text)

    return say


def _read_tokenizer(checkpoint: Path, trust_remote_code: bool) -> Any:
    from roll_r3.models.hf.tokenizer import read_tokenizer  # noqa: PLC0415  seconds: after the first line is on screen

    try:
        return read_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    except Exception as error:  # its files, and its code, may be anything
        raise ConfigError(
            f"the tokenizer of {checkpoint} cannot be read: {error} (if it is code that comes with the checkpoint, "
            "actor_train.model_args.trust_remote_code: true allows it)"
        ) from error


def _log_driver(run_dir: RunDir, progress: Progress) -> None:
    """This process's log goes to a file: the terminal is for progress."""
    handler = RunLog(run_dir.log_file("driver"), progress.say)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    log_threads()
