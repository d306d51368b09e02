"""Dialect of a file: decided once, by the file alone, and kept through a migration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.config.findings.report import ABSENT, Finding, InvalidConfigError, render
from roll_r3.config.reading.yaml_file import parse_yaml, to_yaml
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.from_roll.defaults import DEFAULTS
from roll_r3.from_roll.signs import dialect_of, is_clear
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import FILES, ROOT, at, load_text, put

RECIPE = """\
hydra: {run: {dir: .}, output_subdir: null}
exp_name: half-migrated
logging_dir: ./logs
logging_steps: 1
output_dir: ./out
system_envs: {USE_MODELSCOPE: '1'}
checkpoint_config: {type: file_system, output_dir: "./models/${exp_name}"}
track_with: wandb
tracker_kwargs: {project: mine}
num_gpus_per_node: 8
max_steps: 20
eval_steps: 5
resume_from_checkpoint: false
rollout_batch_size: 16
prompt_length: 256
response_length: 512
adv_estimator: reinforce
value_clip: 0.5
reward_clip: 10
advantage_clip: 2.0
dual_clip_loss: true
norm_mean_type: ~
norm_std_type: ~
whiten_advantages: true
max_len_mask: true
difficulty_mask: true
difficulty_low_threshold: 0.1
error_max_len_clip: false
length_loss_weight: false
pretrain: Qwen/Qwen3-30B-A3B
reward_pretrain: Qwen/Qwen3-30B-A3B
validation: {data_args: {file_name: [held_out.jsonl]}, generating_args: {max_new_tokens: "${response_length}"}}
actor_train:
  model_args: {disable_gradient_checkpointing: false, dtype: bf16, model_type: ~}
  training_args: {learning_rate: 1.0e-6, gradient_accumulation_steps: 32, num_train_epochs: 2}
  data_args:
    template: qwen3
    file_name: [sums.jsonl, code.jsonl]
    domain_interleave_probs: {math_rule: 0.7, code_sandbox: 0.3}
    dataset_dir: data
    messages: messages
    preprocessing_num_workers: 8
  strategy_args:
    strategy_name: megatron_train
    strategy_config: {expert_model_parallel_size: 2, use_distributed_optimizer: true, recompute_granularity: full}
  device_mapping: list(range(0,8))
actor_infer:
  model_args: {disable_gradient_checkpointing: true}
  generating_args: {max_new_tokens: "${response_length}", temperature: 0.99, num_beams: 1, num_return_sequences: 1}
  data_args: {template: qwen3}
  strategy_args: {strategy_name: sglang, strategy_config: {mem_fraction_static: 0.7, load_format: dummy}}
  num_gpus_per_worker: 2
  infer_batch_size: 1
  device_mapping: list(range(8,12))
rewards:
  math_rule:
    worker_cls: roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker
    model_args: {model_name_or_path: "${reward_pretrain}"}
    tag_included: [sums]
    world_size: 4
  code_sandbox:
    worker_cls: roll.pipeline.rlvr.rewards.code_sandbox_reward_worker.CodeSandboxRewardWorker
    use_local: true
    tag_included: [code]
"""
"""File in the style of ROLL's recipes, with most of their settings in few lines."""


def recipe() -> dict[str, Any]:
    return parse_yaml(RECIPE, "recipe.yaml").value


WRITTEN = {
    "rewards.math_rule.worker_cls": {"rewards.math_rule.reward": "math"},
    "rewards.code_sandbox.worker_cls": {"rewards.code_sandbox.reward": "mine.judge:run"},
    "track_with": {"track_with": ["tensorboard"]},
    "adv_estimator": {"adv_estimator": "grpo"},
    "num_gpus_per_node": {"num_gpus_per_node": 8},
}
"""Key -> replacement suggested by the report, if there is one."""
MOVED: dict[str, dict[str, Any]] = {
    "actor_infer.num_gpus_per_worker": {"actor_infer.strategy_args.strategy_config.tp_size": 2},
    "dual_clip_loss": {"dual_clip_loss": 1.4},
    "actor_train.data_args.messages": {"actor_train.data_args.messages": "messages"},
}
"""Key -> the same in roll_r3's schema, as shown in a note."""


def advised() -> list[str]:
    """Return the keys to remove by the report on the recipe."""
    findings = translate(recipe(), {})[2]
    return [path for f in findings if f.rule in ("roll-unsupported", "roll-unread") for path, _ in f.found]


EDITS = sorted({*advised(), *WRITTEN, *MOVED, "actor_train.data_args.domain_interleave_probs"})


def edited(paths: set[str]) -> dict[str, Any]:
    data = recipe()
    for path in sorted(paths):
        data = put(data, path, ABSENT)
        for target, value in (WRITTEN | MOVED).get(path, {}).items():
            data = put(data, target, value)
    return data


def settings(data: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ROLL's default fields after translation."""
    translated = translate(data, {})[0]
    return {path: at(translated, path) for path in DEFAULTS}


SUBSETS = [set(EDITS), *({path} for path in EDITS), *(set(EDITS) - {path} for path in EDITS)]


@pytest.mark.parametrize("paths", SUBSETS, ids=lambda paths: f"{len(paths)}-{min(paths)}")
def test_advised_edits_keep_the_dialect_and_its_defaults(paths):
    assert dialect_of(edited(paths)).name == "roll"
    assert settings(edited(paths)) == settings(recipe())


@given(st.sets(st.sampled_from(EDITS)))
def test_any_subset_of_advised_edits_keeps_them(paths):
    assert dialect_of(edited(paths)).name == "roll"
    assert settings(edited(paths)) == settings(recipe())


def test_the_edits_are_those_of_the_report():
    assert len(EDITS) > 20
    assert {"actor_train.data_args.domain_interleave_probs", "rewards.code_sandbox.worker_cls", "hydra"} <= set(EDITS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_in_rolls_style_are_rolls(path):
    dialect = dialect_of(parse_yaml(path.read_text(), path.name).value)
    assert dialect.is_rolls
    assert is_clear(dialect)


OWN = sorted([*(ROOT / "configs").glob("**/*.yaml"), *(ROOT / "examples").glob("**/*.yaml")])


@pytest.mark.parametrize("path", OWN, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_files_of_our_own_are_ours(path):
    dialect = dialect_of(parse_yaml(path.read_text(), path.name).value)
    assert (dialect.name, dialect.rolls) == ("roll_r3", ())


def rules(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.rule for finding in findings]


def test_no_override_changes_the_dialect():
    loaded = load_text(
        MINIMAL, "run.yaml", ["rewards.m.worker_cls=a.MathRuleRewardWorker", "logging_dir=x", "hydra={}"]
    )
    assert loaded.origins.dialect is not None
    assert loaded.origins.dialect.name == "roll_r3"
    assert loaded.config.loss_agg_mode == "token-mean"
    gone = [f"{path}=null" for path in EDITS]
    loaded = load_text(RECIPE, "recipe.yaml", [*gone, "rewards.math_rule.reward=math", "adv_estimator=grpo"])
    assert loaded.origins.dialect is not None
    assert loaded.origins.dialect.is_rolls
    assert loaded.config.loss_agg_mode == "seq-mean-token-mean"


def test_the_key_decides_whatever_the_signs():
    ours = load_text(f"dialect: roll_r3\n{RECIPE}", "recipe.yaml")
    assert ours.config.loss_agg_mode == "token-mean"
    assert "roll-defaults" not in rules(ours.findings)
    rolls = load_text(f"dialect: roll\n{MINIMAL}", "run.yaml")
    assert rolls.config.loss_agg_mode == "seq-mean-token-mean"
    assert rolls.config.dialect == "roll_r3", "it is translated"
    assert load_text(MINIMAL, "run.yaml", ["dialect=roll"]).config.loss_agg_mode == "seq-mean-token-mean"


def test_what_is_printed_is_read_as_ours():
    config = load_text(f"dialect: roll\n{MINIMAL}", "run.yaml").config
    printed = to_yaml(config)
    assert printed.startswith("dialect: roll_r3\n")
    again = load_text(printed, "printed.yaml")
    assert again.config == config
    assert again.origins.headline == "printed.yaml is read as a file of roll_r3 (dialect: roll_r3), as stated"


def test_another_dialect_is_a_mistake():
    (finding,) = load_text(f"dialect: rol\n{MINIMAL}", "run.yaml").findings
    assert (finding.path, finding.fix) == ("dialect", "write one of roll_r3, roll")


def test_a_report_begins_with_the_dialect():
    loaded = load_text(RECIPE, "recipe.yaml")
    first = render(loaded.findings, loaded.origins).splitlines()[0]
    assert first.startswith("recipe.yaml is read as a file for ROLL (dialect: roll): rewards.*.worker_cls, ")
    assert first.endswith("more keys. `dialect: roll` in the file makes it certain")
    assert load_text(MINIMAL, "run.yaml").origins.headline == "run.yaml is read as a file of roll_r3 (dialect: roll_r3)"


MIXED = (
    "exp_name: x\npretrain: Qwen/Qwen3-30B-A3B\nactor_infer: {}\n"
    "actor_train: {data_args: {file_name: 'bundled:addition_mod10', ground_truth: answer}}\n"
    "rewards: {m: {reward: math, world_size: 4}}\nlogging_dir: y\n"
)


def test_a_file_that_could_be_read_both_ways_is_warned_of():
    loaded = load_text(MIXED, "mixed.yaml")
    (warning,) = [f for f in loaded.findings if f.rule == "dialect-unclear"]
    assert warning.severity == "warning"
    assert "logging_dir" in warning.why
    assert "ground_truth" in warning.why
    assert "dialect: roll" in warning.fix
    assert "loss_agg_mode" in {path for path, _ in warning.found}
    for name in ("roll", "roll_r3"):
        assert "dialect-unclear" not in rules(load_text(f"dialect: {name}\n{MIXED}", "mixed.yaml").findings)


def test_a_file_that_means_the_same_both_ways_is_not():
    data = copy.deepcopy(parse_yaml(MIXED, "mixed.yaml").value)
    for path, value in DEFAULTS.items():
        data = put(data, path, value)
    text = "\n".join(f"{key}: {value!r}" for key, value in data.items()).replace("None", "null")
    assert "dialect-unclear" not in rules(load_text(text, "mixed.yaml").findings)


def test_an_unused_reference_weighs_the_same_in_both():
    severities = []
    for name in ("roll", "roll_r3"):
        loaded = load_text(f"dialect: {name}\n{MINIMAL}reference: {{}}\n", "run.yaml")
        findings = [*loaded.findings, *check_rules(loaded.config)]
        severities.append(
            [f.severity for f in findings if f.rule == "reference-unused" or "reference" in dict(f.found)]
        )
    assert severities == [["warning"], ["warning"]]


def test_full_recompute_weighs_the_same_in_both():
    text = MINIMAL.replace(
        "  data_args",
        "  strategy_args: {strategy_config: {recompute_granularity: full}}\n  data_args",
    )
    severities = []
    for name in ("roll", "roll_r3"):
        loaded = load_text(f"dialect: {name}\n{text}", "run.yaml")
        layout = loaded.config.actor_train.strategy_args.strategy_config
        assert (layout.recompute_method, layout.recompute_num_layers) == ("uniform", 1)
        severities.append([f.severity for f in loaded.findings if "recompute_granularity" in f.path])
    assert severities == [["note"], ["note"]]


OTHERS = {
    "agentic": "custom_envs: {}\ntrain_env_manager: {tags: [Maze]}\npretrain: x\nactor_train: {}\nactor_infer: {}\n",
    "SFT": "sft_train: {data_args: {file_name: a.jsonl}}\nprompt_key: instruction\npretrain: x\n",
    "DPO": "chosen_key: good\nrejected_key: bad\nbeta: 0.1\nactor_train: {}\nreference: {}\n",
    "distillation": "student: {}\nteacher: {}\nstudent_pretrain: x\nkd_objective: forward_kl\n",
    "on-policy distillation": "student_train: {data_args: {}}\nteacher: {a: {}}\nrewards: {m: {worker_cls: A}}\n",
}


@pytest.mark.parametrize("pipeline", OTHERS)
def test_a_file_of_another_pipeline_is_named_in_one_line(pipeline):
    text = f"exp_name: 7\nhydra: {{}}\nof_nobody: 3\n{OTHERS[pipeline]}"
    with pytest.raises(InvalidConfigError) as refused:
        load_text(text, "other.yaml")
    (finding,) = refused.value.findings
    assert finding.rule == "roll-pipeline"
    assert f"ROLL's {pipeline} pipeline: it has {finding.path} (line " in finding.why
    assert "dialect: roll)" in str(refused.value).splitlines()[0]
    assert len(str(refused.value).splitlines()) == 5, "the dialect, the error, how many there are"


def test_a_stray_key_of_another_pipeline_can_be_taken_away():
    loaded = load_text(f"{MINIMAL}chosen_key: good\n", "run.yaml", ["chosen_key=null"])
    assert not loaded.findings
    switched_off = load_text(f"{RECIPE}is_pure_opd: false\n", "recipe.yaml")
    assert "roll-pipeline" not in rules(switched_off.findings)
    assert "unknown-field" in rules(load_text(f"dialect: roll_r3\n{MINIMAL}sft_train: 1\n", "run.yaml").findings)
