"""Rules about checkpoints, data, reward functions and directories."""

from __future__ import annotations

from roll_r3.config.derived import uses_saving_dir
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.data import COLUMNS
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.rules.table import Verdict
from roll_r3.models.families import untrainable_by_name
from roll_r3.preflight.rules.surroundings_rule import CHECKPOINTS, Pretend, SurroundingsRule
from roll_r3.preflight.surroundings import Surroundings
from roll_r3.tracking.trackers.libraries import LIBRARIES


def _unreadable_checkpoints(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    problems = surroundings.checkpoint_problems.items()
    return "; ".join(f"{name}: {problem}" for name, problem in problems)


def _unknown_models(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    shown = []
    for name in surroundings.unknown_models(config):
        guess = untrainable_by_name(name)
        if guess is None:
            shown.append(name)
        elif not guess.certain:  # else it is refused
            shown.append(f"{name}, by its name: {guess.reason}")
    return "; ".join(shown)


RULES: tuple[SurroundingsRule, ...] = (
    SurroundingsRule(
        id="checkpoint-readable",
        fields=CHECKPOINTS,
        why="a checkpoint is a directory with config.json, a tokenizer and *.safetensors, or a name on the hub",
        fix="write the path of a complete directory, or owner/model",
        wrong=("pretrain=./no/such/checkpoint",),
        right=("pretrain=Qwen/Qwen3-235B-A22B",),
        violates=_unreadable_checkpoints,
    ),
    SurroundingsRule(
        id="model-unknown-here",
        fields=CHECKPOINTS,
        why="this checkpoint is unknown on this machine, so its model was not checked; the run checks it after the "
        "download",
        fix="put its config.json into that directory or into the hub's cache",
        wrong=("pretrain=someone/some-model",),
        right=("pretrain=Qwen/Qwen3-235B-A22B",),
        violates=_unknown_models,
        severity="warning",
    ),
    SurroundingsRule(
        id="data-readable",
        fields=("actor_train.data_args.file_name",),
        depends=tuple(f"actor_train.data_args.{name}" for name in COLUMNS),
        why="prompts come from files with valid rows",
        fix="write the paths of existing files (relative to the working directory), and their columns",
        wrong=("actor_train.data_args.file_name=no_such_prompts.jsonl",),
        right=("actor_train.data_args.file_name='bundled:copy_digits'",),
        violates=lambda config, where: "\n".join(where.data_problems),
    ),
    SurroundingsRule(
        id="domains-have-a-rule",
        fields=("rewards.*.tag_included", "actor_train.data_args.domain", "actor_train.data_args.file_name"),
        why="every row is scored by the reward rule for its domain, and no rule takes other domains",
        fix="write the domains into a tag_included, remove tag_included from one rule, or remove the files",
        wrong=(
            "actor_train.data_args={file_name: docs/prompts.jsonl, domain: tag}",
            "rewards={a: {reward: exact_match, tag_included: [x]}}",
        ),
        wrong_where=Pretend(domain_problems=("docs/prompts.jsonl has rows of code",)),
        right=("rewards={a: {reward: exact_match, tag_included: [default]}}",),
        violates=lambda config, where: "; ".join(where.domain_problems),
    ),
    SurroundingsRule(
        id="evaluation-data-readable",
        fields=("validation.data_args.file_name",),
        depends=(*(f"validation.data_args.{name}" for name in COLUMNS), "rewards"),
        why="prompts of the evaluation come from files with valid rows, each with a reward rule for its domain",
        fix="write the paths of existing files (relative to the working directory), and their columns",
        wrong=("validation={data_args: {file_name: no_such_prompts.jsonl}}",),
        right=("validation={data_args: {file_name: 'bundled:copy_digits'}}",),
        violates=lambda config, where: "\n".join(where.evaluation_problems),
    ),
    SurroundingsRule(
        id="tracker-installed",
        fields=("track_with",),
        why="the library of a tracker is not installed here",
        fix="install the named extras, or remove the trackers",
        wrong=("track_with=[wandb]",),
        wrong_where=Pretend(missing_trackers=("wandb",)),
        right=("track_with=[tensorboard]",),
        violates=lambda config, where: ", ".join(
            f"{name}: pip install 'roll_r3[{LIBRARIES[name].extra}]'" for name in where.missing_trackers
        ),
    ),
    SurroundingsRule(
        id="reward-importable",
        fields=("rewards.*.reward", "rewards.*.kwargs"),
        why="a reward function must be on the import path and accept its kwargs and the offered values; its module is "
        "searched, not imported",
        fix="add its directory to PYTHONPATH, or correct the name, the kwargs, or the function's parameters: offered "
        "names, or (response, ground_truth, **kwargs)",
        wrong=("rewards.default.reward=no_such_package.rewards:score",),
        right=("rewards.default.reward=roll_r3.rewards.rules:exact_match",),
        violates=lambda config, where: "; ".join(where.reward_problems),
    ),
    SurroundingsRule(
        id="judge-key-set",
        fields=("rewards.*.judge.api_key_env",),
        why="the key of a judge is read from the environment, and these variables are not set",
        fix="export them in the shell that starts the run, or write them in system_envs",
        depends=("system_envs", "rewards"),
        wrong=("rewards={a: {reward: llm_judge, judge: {base_url: http://a/v1, model: m, api_key_env: NO_SUCH_KEY}}}",),
        right=(
            "rewards={a: {reward: llm_judge, judge: {base_url: http://a/v1, model: m, api_key_env: NO_SUCH_KEY}}}",
            "system_envs={NO_SUCH_KEY: abc}",
        ),
        violates=lambda config, where: ", ".join(where.missing_keys),
    ),
    SurroundingsRule(
        id="output-writable",
        fields=("output_dir", "exp_name"),
        why="the run's directory cannot be made",
        fix="write the path of a directory that you may write to",
        wrong=("output_dir=/dev/null/runs",),
        right=("output_dir=output",),
        violates=lambda config, where: where.output_problem,
    ),
    SurroundingsRule(
        id="checkpoints-writable",
        fields=("checkpoint_config.output_dir", "exp_name"),
        depends=("save_steps", "save_hf_steps", "resume_from_checkpoint"),
        why="the directory of checkpoints cannot be made",
        fix="write the path of a directory that you may write to, on a disk shared by all nodes",
        wrong=("checkpoint_config.output_dir=/dev/null/checkpoints",),
        right=("checkpoint_config.output_dir=output",),
        violates=lambda config, where: (
            config.checkpoint_config.output_dir is not None and uses_saving_dir(config) and where.saving_problem
        ),
    ),
    SurroundingsRule(
        id="resume-from-checkpoint",
        fields=("resume_from_checkpoint",),
        why="a run can resume only from a complete checkpoint of roll_r3",
        fix="write auto, off, or the path of a run or of a checkpoint, like <run>/checkpoints/step-00000050",
        wrong=("resume_from_checkpoint=no/such/checkpoint",),
        right=("resume_from_checkpoint=auto",),
        violates=lambda config, where: where.resume_problem,
    ),
    SurroundingsRule(
        id="engine-python-exists",
        fields=(f"{ENGINE}.python",),
        why="there is no such interpreter on this machine",
        fix="write the path of `bin/python` in the engine's environment (`make vllm-env` creates it for vLLM)",
        wrong=(f"{ENGINE}.python=/no/such/bin/python",),
        right=(f"{ENGINE}.python=null",),
        violates=lambda config, where: where.engine_python_missing,
    ),
)
