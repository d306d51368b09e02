"""Checkpoints, data, reward functions and the output directory: whether they are there."""

from __future__ import annotations

from roll_r3.config.derived import checkpoint_of, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.rules.table import Verdict
from roll_r3.preflight.rules.table import SurroundingsRule
from roll_r3.preflight.surroundings import Surroundings

_COLUMNS = tuple(f"actor_train.data_args.{name}" for name in ("prompt", "messages", "ground_truth", "domain", "id"))
_CHECKPOINTS = ("pretrain", "*.model_args.model_name_or_path")


def _unreadable_checkpoints(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    problems = surroundings.checkpoint_problems.items()
    return "; ".join(f"{name}: {problem}" for name, problem in problems)


def _unknown_models(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    names = {checkpoint_of(config, role) for role in workers(config)}
    return ", ".join(sorted(names - set(surroundings.models) - set(surroundings.checkpoint_problems)))


RULES: tuple[SurroundingsRule, ...] = (
    SurroundingsRule(
        id="checkpoint-readable",
        fields=_CHECKPOINTS,
        why="a checkpoint is a directory with config.json, a tokenizer and *.safetensors, or a name on the hub",
        fix="name a complete directory, or write owner/model",
        wrong=("pretrain=./no/such/checkpoint",),
        right=("pretrain=Qwen/Qwen3-235B-A22B",),
        violates=_unreadable_checkpoints,
    ),
    SurroundingsRule(
        id="model-unknown-here",
        fields=_CHECKPOINTS,
        why="nothing is known here of this checkpoint, so that nothing that depends on the model was checked; it is "
        "checked once more when the run has it",
        fix="have its config.json here, in that directory or in the hub's cache",
        wrong=("pretrain=someone/some-model",),
        right=("pretrain=Qwen/Qwen3-235B-A22B",),
        violates=_unknown_models,
        severity="warning",
    ),
    SurroundingsRule(
        id="data-readable",
        fields=("actor_train.data_args.file_name",),
        depends=tuple(
            f"actor_train.data_args.{name}" for name in ("prompt", "messages", "ground_truth", "domain", "id")
        ),
        why="prompts come from files that can be read and have the named columns",
        fix="name files that are there (relative to where the run starts), and their columns",
        wrong=("actor_train.data_args.file_name=no_such_prompts.jsonl",),
        right=("actor_train.data_args.file_name='bundled:copy_digits'",),
        violates=lambda config, where: "; ".join(where.data_problems),
    ),
    SurroundingsRule(
        id="reward-importable",
        fields=("rewards.*.reward", "rewards.*.kwargs"),
        why="a reward function must be found on the import path (which is searched, nothing is imported) and take "
        "(response, ground_truth, **kwargs)",
        fix="put its directory on PYTHONPATH, or correct the name, the function's arguments or the kwargs",
        wrong=("rewards.default.reward=no_such_package.rewards:score",),
        right=("rewards.default.reward=roll_r3.rewards.rules:exact_match",),
        violates=lambda config, where: "; ".join(where.reward_problems),
    ),
    SurroundingsRule(
        id="output-writable",
        fields=("output_dir", "exp_name"),
        why="the run's directory could not be made",
        fix="name a directory that can be written",
        wrong=("output_dir=/dev/null/runs",),
        right=("output_dir=output",),
        violates=lambda config, where: where.output_problem,
    ),
    SurroundingsRule(
        id="checkpoints-writable",
        fields=("checkpoint_config.output_dir", "exp_name"),
        why="the directory of checkpoints could not be made",
        fix="name a directory that can be written, on a disk that every node sees",
        wrong=("checkpoint_config.output_dir=/dev/null/checkpoints",),
        right=("checkpoint_config.output_dir=output",),
        violates=lambda config, where: config.checkpoint_config.output_dir is not None and where.saving_problem,
    ),
    SurroundingsRule(
        id="resume-from-checkpoint",
        fields=("resume_from_checkpoint",),
        why="a run goes on from a checkpoint that roll_r3 wrote and completed",
        fix="write auto, off, or the path of a run or of a checkpoint, like <run>/checkpoints/step-00000050",
        wrong=("resume_from_checkpoint=no/such/checkpoint",),
        right=("resume_from_checkpoint=auto",),
        violates=lambda config, where: where.resume_problem,
    ),
    SurroundingsRule(
        id="engine-python-exists",
        fields=(f"{ENGINE}.python",),
        why="there is no such interpreter here",
        fix="name the `bin/python` of the environment that has the engine (`make vllm-env` makes vLLM's)",
        wrong=(f"{ENGINE}.python=/no/such/bin/python",),
        right=(f"{ENGINE}.python=null",),
        violates=lambda config, where: where.engine_python_missing,
    ),
)
