"""Files that were written for ROLL: what becomes of every key, and that nothing is lost on the way."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.config.explain import annotations_at
from roll_r3.config.interpolate import resolve
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import ABSENT, Finding, Origins, render
from roll_r3.config.roll_yaml import include_defaults, render_from_roll, translate
from roll_r3.config.roll_yaml.defaults import DEFAULTS, DOMAIN, KL_LOSS_COEF
from roll_r3.config.roll_yaml.draft import SIGNS
from roll_r3.config.roll_yaml.rows import Moved, Off, Row, Same, Unread
from roll_r3.config.roll_yaml.translate import TABLES
from roll_r3.config.rules import check_rules
from roll_r3.config.yaml_file import parse_yaml

HERE = Path(__file__).parent
FILES = sorted((HERE / "roll").glob("*.yaml"))
OWN = sorted((HERE.parents[2] / "configs").glob("*.yaml"))
PAGE = HERE.parents[2] / "docs" / "from_roll.md"
ALL_ROWS = [row for _, rows in TABLES.values() for row in rows]
ENGINE = "actor_infer.strategy_args.strategy_config"
LAYOUT = "actor_train.strategy_args.strategy_config"
MATH = "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker"

Translated = tuple[dict[str, Any], dict[str, str], list[Finding]]


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file as it is before translation, and its places."""
    parsed = parse_yaml(path.read_text(), path.name)
    data, places, findings = include_defaults(parsed.value, parsed.places)
    assert not parsed.findings
    assert not findings
    data, unresolved = resolve(data, places)
    assert not unresolved
    return data, places


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`data` with a value set, or taken out if it is ABSENT."""
    data = copy.deepcopy(data)
    *above, last = path.split(".")
    node = data
    for key in above:
        node = node.setdefault(key, {})
    node.pop(last, None)
    if value is not ABSENT:
        node[last] = value
    return data


def at(data: dict[str, Any], path: str) -> Any:
    """The value at a path, ABSENT if there is none."""
    node: Any = data
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return ABSENT
        node = node[key]
    return node


def of_roll(**changes: Any) -> dict[str, Any]:
    """A small file of ROLL's; `a__b` in a name stands for a dot."""
    data: dict[str, Any] = {
        "exp_name": "small",
        "pretrain": "some/checkpoint",
        "adv_estimator": "grpo",
        "num_return_sequences_in_group": 8,
        "actor_train": {
            "data_args": {"file_name": "a.jsonl", "messages": "messages", "domain_interleave_probs": {"math_rule": 1.0}}
        },
        "actor_infer": {"generating_args": {"temperature": 1.0, "top_p": 1.0, "top_k": -1}},
        "rewards": {"math_rule": {"worker_cls": MATH}},
    }
    for name, value in changes.items():
        data = put(data, name.replace("__", "."), value)
    return data


def run(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """The translated tree, and the paths that each rule names."""
    translated, _, findings = translate(data, {})
    named: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        named[finding.rule] = named.get(finding.rule, ()) + tuple(path for path, _ in finding.found)
    return translated, named


# Whole files


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_whole_file_becomes_a_configuration(path):
    data, places = read(path)
    translated, _, findings = translate(data, places)
    if path.stem == "vllm":  # whether there is such a strategy is for the models to say
        assert at(translated, "actor_infer.strategy_args") == data["actor_infer"]["strategy_args"]
        translated = put(translated, "actor_infer.strategy_args", ABSENT)
    config = RLVRConfig.model_validate(translated)
    assert not [f for f in check_rules(config) if f.severity == "error"]
    assert sum(f.rule == "roll-unsupported" for f in findings) == (path.stem != "sglang")
    assert sum(f.rule == "roll-unread" for f in findings) == 1
    assert {f.severity for f in findings if f.rule in ("roll-translated", "roll-defaults")} == {"note"}


def test_the_sglang_file_means_what_it_meant():
    config = RLVRConfig.model_validate(translate(*read(HERE / "roll" / "sglang.yaml"))[0])
    assert (config.adv_estimator, config.norm_adv_by_std_in_grpo, config.advantage_clip) == ("grpo", True, 2.0)
    assert (config.clip_range, config.dual_clip_loss) == ((0.2, 0.28), 1.4)
    assert (config.use_kl_loss, config.kl_loss_coef, config.kl_estimator) == (True, 0.002, "k3")
    assert (config.rollout_correction.mode, config.rollout_correction.cap) == ("token_tis", 2.0)
    assert config.loss_agg_mode == "seq-mean-token-mean"
    training = config.actor_train.training_args
    assert (training.learning_rate, training.max_grad_norm, training.warmup_steps) == (1e-6, 0.5, 10)
    assert (training.lr_scheduler_type, training.adam_beta2) == ("linear", 0.999)
    assert config.actor_train.max_tokens_per_microbatch_in_train == 8192
    layout = config.actor_train.strategy_args.strategy_config
    assert (layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size) == (2, None)
    assert (layout.recompute_granularity, layout.recompute_modules) == ("selective", ("core_attn", "moe"))
    engine = config.actor_infer.strategy_args.strategy_config
    assert (engine.tp_size, engine.mem_fraction_static, engine.server_args) == (2, 0.7, {"page_size": 1})
    assert config.actor_infer.generating_args.max_new_tokens == config.response_length == 3072
    assert config.actor_train.router_replay.mode == config.actor_infer.router_replay.mode == "R3"
    assert config.rewards["math_rule"].reward == "math"
    assert config.rewards["math_rule"].tag_included == ()
    assert config.actor_train.data_args.domain is None


def test_the_vllm_file_names_what_is_missing_all_at_once():
    data, places = read(HERE / "roll" / "vllm.yaml")
    translated, _, findings = translate(data, places)
    (refused,) = [f for f in findings if f.rule == "roll-unsupported"]
    assert refused.severity == "error"
    assert {path for path, _ in refused.found} == {
        "save_steps",
        "track_with",
        "system_envs",
        "adv_estimator",
        "whiten_advantages",
        "max_len_mask",
        "difficulty_mask",
        "actor_train.data_args.domain_interleave_probs",
        "rewards.math_rule.query_filter_config",
        "rewards.code_sandbox.worker_cls",
    }
    assert all(path in refused.fix for path, _ in refused.found)
    assert translated["response_length"] == 4096
    assert "reference" not in translated
    assert list(translated["rewards"]) == ["math_rule"]
    assert at(translated, "actor_train.max_tokens_per_microbatch_in_train") == 8192
    assert at(translated, "actor_train.max_tokens_per_microbatch_in_infer") == 16384
    text = render(findings, Origins("vllm.yaml", places))
    assert "vllm.yaml:25" in text
    assert "secret-of-the-user" not in text


def test_the_deepspeed_file_is_refused_for_deepspeed_and_lora_only():
    data, places = read(HERE / "roll" / "deepspeed.yaml")
    _, named = run(data)
    assert named["roll-unsupported"] == (
        "actor_train.strategy_args.strategy_name",
        "actor_train.model_args.lora_target",
    )
    translated, _, _ = translate(data, places)
    assert not any(key.startswith("deepspeed") for key in translated)
    assert at(translated, "actor_train.data_args.domain") == "source"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_translating_twice_changes_nothing(path):
    translated, places, _ = translate(*read(path))
    assert translate(translated, places) == (translated, places, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_called_unread_changes_nothing(path):
    data, _ = read(path)
    translated, named = run(data)
    for key in named["roll-unread"]:
        assert run(put(data, key, ABSENT))[0] == translated, key


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_null_takes_any_key_of_rolls_away(path):
    data, _ = read(path)
    _, named = run(data)
    for key in named.get("roll-unsupported", ()):
        if not key.endswith(("strategy_name", "adv_estimator", "worker_cls")):
            assert key not in run(put(data, key, None))[1].get("roll-unsupported", ()), key


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_a_file_of_our_own_comes_back_as_it_is(path):
    data, places = read(path)
    assert translate(data, places) == (data, places, [])
    complete = RLVRConfig.model_validate(data).model_dump(mode="json")
    assert translate(complete, {}) == (complete, {}, [])


def test_settings_of_our_own_keep_our_meaning():
    data = {
        "adv_estimator": "reinforce",
        "add_token_level_kl": True,
        "init_kl_coef": 0.1,
        "pg_clip_low": 0.1,
        "kl_loss_coef": 0.5,
        "reference": {},
        "actor_train": {
            "data_args": {"prompt": "question"},
            "max_tokens_per_microbatch_in_train": 5,
            "strategy_args": {
                "strategy_config": {
                    "virtual_pipeline_model_parallel_size": 1,
                    "sequence_parallel": True,
                    "recompute_granularity": "full",
                }
            },
        },
        "actor_infer": {
            "infer_batch_size": 4,
            "model_args": {"dtype": "fp32"},
            "generating_args": {"max_new_tokens": 3},
        },
    }
    assert translate(data, {}) == (data, {}, [])


def test_a_field_of_ours_in_the_wrong_place_stays_a_mistake():
    data = {
        "actor_train": {"generating_args": {"top_p": 0.5}, "training_args": {"max_steps": 5}, "data_args": {}},
        "actor_infer": {"data_args": {"file_name": "a.jsonl"}},
        "reward": {"reward": "math"},
    }
    assert run(data) == (data, {})
    misplaced = put(of_roll(), "actor_train.training_args.max_steps", 5)
    assert "actor_train.training_args.max_steps" in run(misplaced)[1]["roll-unread"]


# Key by key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # lengths
        ({"sequence_length": 4096}, {"response_length": 3072, "sequence_length": ABSENT}),
        ({"sequence_length": 4096, "prompt_length": 96, "response_length": 7}, {"response_length": 4000}),
        # tracking
        ({"track_with": "tensorboard"}, {"track_with": ["tensorboard"]}),
        ({"track_with": "stdout"}, {"track_with": []}),
        # advantages
        ({"adv_estimator": "grpo", "norm_mean_type": None}, {"adv_estimator": "grpo", "norm_mean_type": ABSENT}),
        (
            {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": "group"},
            {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": ABSENT, "norm_std_type": ABSENT},
        ),
        (
            {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": "None"},
            {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False, "norm_mean_type": ABSENT},
        ),
        (
            {"adv_estimator": "reinforce", "norm_mean_type": "batch"},
            {"adv_estimator": "reinforce", "norm_mean_type": ABSENT},
        ),
        # clipping
        ({"dual_clip_loss": True}, {"dual_clip_loss": 1.4}),
        ({"dual_clip_loss": True, "pg_clip": 0.3}, {"dual_clip_loss": 1.6}),
        ({"dual_clip_loss": False}, {"dual_clip_loss": ABSENT}),
        (
            {"use_pg_clip_range": True, "pg_clip": 0.1, "pg_clip_high": 0.28},
            {"pg_clip": 0.1, "pg_clip_low": 0.2, "pg_clip_high": 0.28, "use_pg_clip_range": ABSENT},
        ),
        (
            {"use_pg_clip_range": False, "pg_clip_low": 0.1, "pg_clip_high": 0.28},
            {"pg_clip_low": ABSENT, "pg_clip_high": ABSENT, "use_pg_clip_range": ABSENT},
        ),
        # KL
        ({"use_kl_loss": True, "reference": {}}, {"kl_loss_coef": 0, "reference": {}}),
        ({"kl_loss_coef": 0.1, "reference": {}}, {"kl_loss_coef": ABSENT, "reference": ABSENT}),
        ({"add_token_level_kl": False, "init_kl_coef": 0.2}, {"init_kl_coef": ABSENT, "add_token_level_kl": False}),
        # corrections
        (
            {"train_infer_correction": {"is_weight": {"enabled": True}}},
            {"rollout_correction": {"mode": "token_tis", "cap": 1.2}, "train_infer_correction": ABSENT},
        ),
        ({"train_infer_correction": {"is_weight": {"enabled": False}}}, {"rollout_correction": ABSENT}),
        (
            {"train_infer_correction": {"filters": [{"enabled": False, "agg_type": "token"}]}},
            {"train_infer_correction": ABSENT},
        ),
        (
            {"use_rollout_importance_sampling_ratio": True, "rollout_importance_sampling_ratio_upper_bound": 3.0},
            {"rollout_correction": {"mode": "token_tis", "cap": 3.0}},
        ),
        # the optimizer
        ({"max_grad_norm": 0.3}, {"actor_train.training_args.max_grad_norm": 0.3, "max_grad_norm": ABSENT}),
        (
            {"actor_train__training_args__lr_scheduler_type": "constant_with_warmup"},
            {"actor_train.training_args.lr_scheduler_type": "constant"},
        ),
        (
            {"actor_train__training_args": {"warmup_ratio": 0.1, "warmup_steps": 5}},
            {"actor_train.training_args.warmup_ratio": ABSENT, "actor_train.training_args.warmup_steps": 5},
        ),
        # engines
        ({"actor_infer__num_gpus_per_worker": 4}, {f"{ENGINE}.tp_size": 4, "actor_infer.num_gpus_per_worker": ABSENT}),
        ({"actor_infer__num_gpus_per_worker": 1}, {f"{ENGINE}.tp_size": ABSENT}),
        (
            {"actor_infer__num_gpus_per_worker": 8, f"{ENGINE}.tensor_parallel_size": 4},
            {f"{ENGINE}.tp_size": 4, "actor_infer.num_gpus_per_worker": ABSENT},
        ),
        (
            {"actor_infer__model_args__dtype": "fp16"},
            {f"{ENGINE}.dtype": "float16", "actor_infer.model_args.dtype": ABSENT},
        ),
        ({"model_update_buffer_size_mb": 256}, {f"{ENGINE}.weight_bucket_mb": 256}),
        ({f"{ENGINE}.log_level": "warning"}, {f"{ENGINE}.server_args": {"log_level": "warning"}}),
        ({"actor_infer__strategy_args__strategy_config": None}, {ENGINE: ABSENT}),
        # layouts
        (
            {f"{LAYOUT}.virtual_pipeline_model_parallel_size": 1},
            {f"{LAYOUT}.virtual_pipeline_model_parallel_size": ABSENT},
        ),
        ({f"{LAYOUT}.sequence_parallel": True}, {f"{LAYOUT}.sequence_parallel": ABSENT}),
        (
            {LAYOUT: {"sequence_parallel": True, "tensor_model_parallel_size": 2}},
            {f"{LAYOUT}.sequence_parallel": True},
        ),
        (
            {LAYOUT: {"sequence_parallel": False, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}},
            {f"{LAYOUT}.sequence_parallel": ABSENT},
        ),
        (
            {f"{LAYOUT}.recompute_granularity": "full"},
            {LAYOUT: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}},
        ),
        (
            {LAYOUT: {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}},
            {LAYOUT: {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}},
        ),
        (
            {f"{LAYOUT}.recompute_granularity": "selective"},
            {LAYOUT: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}},
        ),
        (
            {LAYOUT: {"recompute_granularity": "selective", "recompute_modules": "moe, layernorm"}},
            {LAYOUT: {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]}},
        ),
        (
            {LAYOUT: {"moe_layer_recompute": True, "recompute_modules": "mlp"}},
            {LAYOUT: {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}},
        ),
        ({f"{LAYOUT}.moe_layer_recompute": False}, {LAYOUT: {}}),
        ({"actor_train__model_args__moe_aux_loss_coef": 0.0}, {LAYOUT: {"moe_aux_loss_coeff": 0.0}}),
        # batching
        (
            {
                "actor_train__use_sequence_packing": True,
                "actor_train__use_dynamic_batching_in_train": False,
                "actor_train__max_tokens_per_microbatch_in_train": 0,
                "actor_train__sequence_packing_args": {
                    "algorithm": "load_balance",
                    "max_packed_sequence_length_train": 64,
                    "max_packed_sequence_length_forward": None,
                },
            },
            {
                "actor_train.use_dynamic_batching_in_train": True,
                "actor_train.max_tokens_per_microbatch_in_train": 64,
                "actor_train.use_dynamic_batching_in_infer": ABSENT,
                "actor_train.sequence_packing_args": ABSENT,
            },
        ),
        (
            {"actor_train__sequence_packing_args": {"algorithm": "none", "max_packed_sequence_length_train": 64}},
            {"actor_train.use_dynamic_batching_in_train": ABSENT, "actor_train.sequence_packing_args": ABSENT},
        ),
        (
            {"actor_train__max_tokens_per_microbatch_in_train": 0, "actor_train__use_dynamic_batching_in_train": False},
            {"actor_train.max_tokens_per_microbatch_in_train": ABSENT},
        ),
        (
            {"actor_train__use_dynamic_batching_in_infer": True, "actor_train__infer_batch_size": 3},
            {"actor_train.use_dynamic_batching_in_infer": True, "actor_train.infer_batch_size": ABSENT},
        ),
        # rewards and data
        (
            {"rewards__math_rule__tag_included": ["a"], "actor_train__data_args__tag": "source"},
            {"rewards.math_rule": {"reward": "math"}, "actor_train.data_args.domain": ABSENT},
        ),
        (
            {"rewards": {"sums": {"worker_cls": MATH, "tag_included": ["a"]}}},
            {"rewards.sums": {"reward": "math", "tag_included": ["a"]}, "actor_train.data_args.domain": "tag"},
        ),
        ({"actor_infer__generating_args__max_new_tokens": 9}, {"actor_infer.generating_args.max_new_tokens": ABSENT}),
    ],
)
def test_a_value_becomes_what_it_means(changes, expected):
    translated, _ = run(of_roll(**changes))
    assert {path: at(translated, path) for path in expected} == expected


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"adv_estimator": "gae"}, "adv_estimator"),
        ({"adv_estimator": ABSENT}, "adv_estimator"),
        ({"adv_estimator": "reinforce"}, "adv_estimator"),
        ({"adv_estimator": "reinforce", "norm_mean_type": "running"}, "norm_mean_type"),
        ({"adv_estimator": "reinforce", "norm_mean_type": "batch", "norm_std_type": "batch"}, "norm_std_type"),
        ({"reward_clip": 2}, "reward_clip"),
        ({"reward_clip": 10, "num_return_sequences_in_group": 200}, "reward_clip"),
        ({"gamma": 0.9}, "gamma"),
        ({"gamma": True}, "gamma"),
        ({"add_token_level_kl": True}, "add_token_level_kl"),
        ({"importance_sampling": "seq"}, "importance_sampling"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode"),
        ({"dataset_filter": 3}, "dataset_filter"),
        ({"norm_mean_type": "batch", "adv_estimator": "gigpo"}, "adv_estimator"),
        ({"async_generation_ratio": 1}, "async_generation_ratio"),
        ({"critic_warmup": 3}, "critic_warmup"),
        ({"dataset_filter": {"min_difficulty": 0.2}}, "dataset_filter"),
        ({"rollout_mock": {"enable": True}}, "rollout_mock"),
        ({"resume_from_checkpoint": "some/where"}, "resume_from_checkpoint"),
        ({"save_steps": 500}, "save_steps"),
        ({"checkpoint_config": {"type": "file_system"}}, "checkpoint_config"),
        ({"track_with": "swanlab"}, "track_with"),
        (
            {"train_infer_correction": {"is_weight": {"enabled": True, "weight_type": "sequence"}}},
            "train_infer_correction.is_weight",
        ),
        (
            {"train_infer_correction": {"is_weight": {"enabled": True, "upper_bound": None}}},
            "train_infer_correction.is_weight",
        ),
        ({"train_infer_correction": {"filters": [{"enabled": True}]}}, "train_infer_correction.filters"),
        ({"train_infer_ratio_mask": True}, "train_infer_ratio_mask"),
        ({"actor_train__worker_cls": "roll.pipeline.rlvr.actor_pg_worker.ActorPGWorker"}, "actor_train.worker_cls"),
        ({"actor_train__data_args__template": "chatml"}, "actor_train.data_args.template"),
        (
            {"actor_train__data_args__messages": ABSENT, "actor_train__data_args__prompt": "p"},
            "actor_train.data_args.prompt",
        ),
        (
            {"actor_train__data_args__domain_interleave_probs": {"a": 0.5, "b": 0.5}},
            "actor_train.data_args.domain_interleave_probs",
        ),
        (
            {"rewards__sums": {"worker_cls": MATH}},
            "actor_train.data_args.domain_interleave_probs",
        ),
        ({"actor_train__training_args__warmup_ratio": 0.1}, "actor_train.training_args.warmup_ratio"),
        ({"actor_infer__generating_args__num_beams": 4}, "actor_infer.generating_args.num_beams"),
        ({"actor_infer__generating_args__repetition_penalty": 1.1}, "actor_infer.generating_args.repetition_penalty"),
        ({"actor_infer__num_gpus_per_worker": 4, f"{ENGINE}.tp_size": 2}, "actor_infer.num_gpus_per_worker"),
        ({LAYOUT: {"moe_layer_recompute": True, "recompute_granularity": "full"}}, f"{LAYOUT}.moe_layer_recompute"),
        ({LAYOUT: {"fp8": "e4m3"}}, f"{LAYOUT}.fp8"),
        ({"rewards__judge__worker_cls": "x.LLMJudgeRewardWorker"}, "rewards.judge.worker_cls"),
        ({"max_grad_norm": 0.3, "actor_train__training_args__max_grad_norm": 0.5}, "max_grad_norm"),
    ],
)
def test_what_would_change_the_run_is_refused_and_taken_out(changes, refused):
    translated, named = run(of_roll(**changes))
    assert refused in named["roll-unsupported"]
    assert at(translated, refused) is ABSENT


@pytest.mark.parametrize(
    "changes",
    [
        {"adv_estimator": "grpo", "norm_mean_type": "group", "norm_std_type": "group"},
        {"use_rollout_importance_sampling_ratio": False},
        {"actor_train__max_tokens_per_microbatch_in_train": 0},
        {"reward_clip": None, "train_infer_correction": {"filters": [{"enabled": False}]}},
        {"gamma": 1.0, "rl_loss_coef": 1, "async_generation_ratio": 0.0, "critic_warmup": 0},
        {"whiten_advantages": False, "max_len_mask": False, "importance_sampling": "token", "use_opd": False},
        {"save_steps": 0, "checkpoint_config": {}, "resume_from_checkpoint": False, "system_envs": {}},
        {"dataset_filter": {"source": None, "num_samples": 0}, "rollout_mock": {"enable": False}},
        {"actor_train__data_args__template": "qwen2_5", "global_template": "native"},
        {"actor_infer__generating_args__num_beams": 1, "actor_infer__generating_args__num_return_sequences": 8},
        {"actor_train__model_args": {"lora_target": None, "model_type": None}},
        {LAYOUT: {"mtp_num_layers": 0, "optimizer": "adam", "fp8": None}},
        {"rewards__math_rule__query_filter_config": {"type": "no_filter"}},
    ],
)
def test_what_means_off_is_dropped_without_a_word(changes):
    translated, named = run(of_roll(**changes))
    plain, of_plain = run(of_roll())
    assert RLVRConfig.model_validate(translated) == RLVRConfig.model_validate(plain)
    assert named == of_plain


@pytest.mark.parametrize(("clip", "is_read"), [(2.4, True), (2.5, False)])
def test_a_reward_clip_is_without_effect_beyond_the_largest_reward_of_a_group(clip, is_read):
    # of 8 rewards one 1 and seven 0: (1 - 1/8) / standard deviation = 7 / sqrt(8) = 2.47
    assert ("reward_clip" in run(of_roll(reward_clip=clip))[1].get("roll-unsupported", ())) == is_read
    by_batch = of_roll(adv_estimator="reinforce", norm_mean_type="batch", reward_clip=1)
    assert "reward_clip" in run(by_batch)[1]["roll-unread"]
    own_rule = put(put(by_batch, "rewards.other", {"reward": "my.rewards:score"}), "reward_clip", 100)
    assert "reward_clip" in run(own_rule)[1]["roll-unsupported"]


@pytest.mark.parametrize(
    "data",
    [
        {"actor_train": 3, "max_grad_norm": 0.5},
        {"rollout_correction": "x", "use_rollout_importance_sampling_ratio": True},
        {"actor_infer": {"strategy_args": ["x"], "num_gpus_per_worker": 2}},
        {"adv_estimator": "magic", "norm_mean_type": "group"},
        {"sequence_length": "long"},
        {"sequence_length": 10, "prompt_length": 20},
        {"track_with": "paper"},
        {"dual_clip_loss": True, "pg_clip": "wide"},
        {"use_pg_clip_range": "yes"},
        {"train_infer_correction": {"is_weight": 3, "filters": "x"}},
        {"actor_train": {"strategy_args": {"strategy_config": {"moe_layer_recompute": "x", "recompute_modules": 3}}}},
    ],
)
def test_what_cannot_be_read_is_left_to_the_models(data):
    assert run(data) == (data, {})


def test_a_section_that_is_none_takes_no_defaults():
    translated, _ = run(of_roll(actor_infer=3))
    assert translated["actor_infer"] == 3
    assert translated["loss_agg_mode"] == "seq-mean-token-mean"


def test_a_budget_of_rolls_says_that_steps_keep_their_samples():
    _, named = run(of_roll(actor_train__use_dynamic_batching_in_train=True))
    assert "actor_train.use_dynamic_batching_in_train" in named["roll-translated"]
    packed = {"algorithm": "load_balance", "max_packed_sequence_length_train": 64}
    _, named = run(of_roll(actor_train__use_sequence_packing=True, actor_train__sequence_packing_args=packed))
    assert "actor_train.use_dynamic_batching_in_train" not in named["roll-translated"]


def test_every_note_names_one_key_and_what_it_became():
    _, _, findings = translate(of_roll(dual_clip_loss=True), {})
    (note,) = [f for f in findings if f.path == "dual_clip_loss"]
    assert (note.severity, note.found, note.fix) == ("note", (("dual_clip_loss", True),), "dual_clip_loss: 1.4")
    assert all(len(f.found) == 1 for f in findings if f.rule == "roll-translated")


def test_places_follow_their_values():
    data = of_roll(
        max_grad_norm=0.3,
        actor_infer__num_gpus_per_worker=4,
        rewards={"sums": {"worker_cls": MATH, "tag_included": ["a"]}},
        actor_train__data_args__tag="source",
    )
    places = {
        "max_grad_norm": "f.yaml:1",
        "actor_infer.num_gpus_per_worker": "override x",
        "rewards.sums.worker_cls": "f.yaml:3",
        "rewards.sums.tag_included.0": "f.yaml:4",
        "actor_train.data_args.tag": "f.yaml:5",
    }
    _, moved, _ = translate(data, places)
    assert moved.items() >= places.items()  # findings name the old keys
    assert moved["actor_train.training_args.max_grad_norm"] == "f.yaml:1"
    assert moved[f"{ENGINE}.tp_size"] == "override x"
    assert moved["rewards.sums.reward"] == "f.yaml:3"
    assert moved["actor_train.data_args.domain"] == "f.yaml:5"
    assert moved["loss_agg_mode"] == "ROLL's default"


def test_values_inside_a_moved_value_keep_their_places():
    data = of_roll(**{f"{ENGINE}.cuda_graph_max_bs": [1, 2]})
    places = {f"{ENGINE}.cuda_graph_max_bs": "f:1", f"{ENGINE}.cuda_graph_max_bs.1": "f:2"}
    _, moved, _ = translate(data, places)
    assert moved[f"{ENGINE}.server_args.cuda_graph_max_bs.1"] == "f:2"


def test_vllm_keys_are_left_to_the_strategy():
    settings = {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 2, "load_format": "dummy", "page_size": 1}
    args = {"strategy_name": "vllm", "strategy_config": settings}
    translated, named = run(of_roll(actor_infer__strategy_args=args, actor_infer__num_gpus_per_worker=2))
    assert translated["actor_infer"]["strategy_args"] == args
    assert "actor_infer.num_gpus_per_worker" in named["roll-unread"]


def test_settings_of_another_trainer_are_left_to_its_strategy():
    args = {"strategy_name": "fsdp2_train", "strategy_config": {"optimizer": "x", "sequence_parallel": True}}
    assert run(of_roll(actor_train__strategy_args=args))[0]["actor_train"]["strategy_args"] == args


def test_transformers_can_sample():
    args = {"strategy_name": "hf_infer", "strategy_config": {"dtype": "float32"}}
    translated, named = run(of_roll(actor_infer__strategy_args=args))
    assert translated["actor_infer"]["strategy_args"] == args
    assert "actor_infer.strategy_args.strategy_name" not in named.get("roll-unsupported", ())


def test_values_of_a_section_are_not_printed():
    data = of_roll(
        tracker_kwargs={"api_key": "hush"}, rewards__math_rule__judge_api_key="hush", system_envs={"K": "hush"}
    )
    _, _, findings = translate(data, {})
    assert {"tracker_kwargs", "rewards.math_rule.judge_api_key", "system_envs"} <= {
        p for f in findings for p, _ in f.found
    }
    assert "hush" not in render(findings, Origins("f.yaml", {}))


# What is left out


def test_rolls_defaults_hold_for_rolls_files_only():
    translated, named = run(of_roll(num_return_sequences_in_group=ABSENT, actor_infer__generating_args=ABSENT))
    assert {path: at(translated, path) for path in DEFAULTS} == DEFAULTS
    assert set(named["roll-defaults"]) == set(DEFAULTS)
    ours = of_roll(rewards={}, actor_train__data_args__domain_interleave_probs=ABSENT)
    assert run(ours) == (ours, {})


@pytest.mark.parametrize("sign", ["rewards.math_rule.worker_cls", "actor_train.data_args.domain_interleave_probs"])
def test_either_sign_makes_a_file_rolls(sign):
    assert "roll-defaults" in run(put(of_roll(), sign, ABSENT))[1]


def test_every_default_is_a_field_and_differs_from_ours():
    ours = RLVRConfig.model_validate(
        {"exp_name": "x", "pretrain": "x", "actor_train": {}, "actor_infer": {}}
    ).model_dump()
    for path, value in (DEFAULTS | KL_LOSS_COEF | DOMAIN).items():
        assert annotations_at(path), path
        assert at(ours, path) != value, path


# Includes


def test_known_includes_become_markers():
    data = {
        "defaults": ["../config/deepspeed_zero3@_here_", "/x/deepspeed_zero.yaml", "config/traj_envs", "_self_"],
        "a": 1,
    }
    included, places, findings = include_defaults(data, {"defaults.0": "f.yaml:2"})
    assert findings == []
    assert included == {
        "a": 1,
        "deepspeed_zero3": {"include": "deepspeed_zero3"},
        "deepspeed_zero": {"include": "deepspeed_zero"},
    }
    assert places["deepspeed_zero3"] == "f.yaml:2"
    assert "defaults" in data
    assert translate(included, places)[0] == {"a": 1}


@pytest.mark.parametrize("entry", ["../config/my_model@_here_", "base", {"db": "mysql"}, 3, None, ["x"]])
def test_other_includes_are_refused_by_name(entry):
    included, _, (finding,) = include_defaults({"defaults": ["deepspeed_zero2", entry]}, {})
    assert finding.severity == "error"
    assert finding.found == (("defaults.1", entry),)
    assert "paste" in finding.fix
    assert list(included) == ["deepspeed_zero2"]


def test_a_block_of_the_users_own_is_not_replaced():
    data = {"defaults": ["deepspeed_zero3"], "deepspeed_zero3": {"bf16": True}}
    assert include_defaults(data, {})[0] == {"deepspeed_zero3": {"bf16": True}}


@pytest.mark.parametrize("value", [None, "x", {}, 3])
def test_defaults_of_another_form_are_left_to_the_models(value):
    assert include_defaults({"defaults": value}, {}) == ({"defaults": value}, {}, [])


# Nothing raises, nothing is lost

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for row in ALL_ROWS for key in row.keys})
KNOWN = {key.partition(".")[0] for key in KEYS} | {"actor_train", "actor_infer", "reference"}
ROLE_NAMES = {"<role>": "actor_train", "<trainer>": "reference", "<engine>": "actor_infer", "*": "math_rule"}


def concrete(pattern: str) -> str:
    return ".".join(ROLE_NAMES.get(part, part) for part in pattern.split("."))


@given(st.dictionaries(st.text(max_size=6), trees, max_size=5))
def test_any_tree_passes_and_is_not_touched_without_a_known_key(data):
    before = copy.deepcopy(data)
    translated, _, findings = translate(data, {})
    assert repr(data) == repr(before)
    if not KNOWN & data.keys():
        assert repr(translated) == repr(data)
        assert findings == []


@given(
    st.dictionaries(
        st.sampled_from(KEYS), trees | st.sampled_from([True, False, "group", "sglang", "full", 1]), max_size=12
    ),
    st.booleans(),
)
def test_any_value_of_any_key_passes(values, is_rolls):
    data: dict[str, Any] = of_roll() if is_rolls else {}
    for key, value in values.items():
        try:
            data = put(data, concrete(key), value)
        except (AttributeError, TypeError):
            continue  # something else than a section stands above the key
    before = copy.deepcopy(data)
    translated, _, findings = translate(data, {})
    assert repr(data) == repr(before)
    assert Counter(f.rule for f in findings)["roll-unsupported"] <= 1
    assert Counter(f.rule for f in findings)["roll-unread"] <= 1
    for path, _ in (item for f in findings if f.rule in ("roll-unsupported", "roll-unread") for item in f.found):
        assert at(translated, path) is ABSENT, path


SECTIONS = ["", "actor_train", "actor_train.model_args", "actor_train.training_args", "actor_train.data_args", LAYOUT]
SECTIONS += ["actor_infer", "actor_infer.generating_args", ENGINE, "reference", "rewards.math_rule"]


@given(st.sampled_from(SECTIONS), trees)
def test_an_unknown_key_survives_wherever_it_stands(section, value):
    data, _ = read(HERE / "roll" / "sglang.yaml")
    path = f"{section}.of_nobody" if section else "of_nobody"
    translated, _ = run(put(data, path, value))
    assert repr(at(translated, path)) == repr(value)


SECTIONS_OF_ROLLS: dict[str, dict[str, Any]] = {
    "train_infer_correction": {"is_weight": {"enabled": False}, "filters": []},
    "train_infer_correction.is_weight": {"enabled": True},
    "actor_train.sequence_packing_args": {"algorithm": "none"},
    "rewards.math_rule.query_filter_config": {"filter_args": {}},
    "rollout_mock": {"mode": "dump"},
}


@pytest.mark.parametrize("section", SECTIONS_OF_ROLLS)
def test_an_unknown_key_survives_in_a_section_of_rolls(section):
    data = put(of_roll(), section, SECTIONS_OF_ROLLS[section] | {"of_nobody": 3})
    assert at(run(data)[0], section) == {"of_nobody": 3}


# The table, and the page that is made of it


def test_no_key_is_listed_twice():
    times = Counter(key for row in ALL_ROWS for key in row.keys)
    assert [key for key in times if times[key] > 1] == []


def fields(pattern: str) -> list[str]:
    """The fields of roll_r3 that a pattern names."""
    roles = {"<role>": ["actor_train", "actor_infer", "reference"], "<trainer>": ["actor_train", "reference"]}
    first, _, rest = pattern.partition(".")
    paths = [f"{role}.{rest}" if rest else role for role in roles.get(first, [concrete(first)])]
    return [path for path in paths if annotations_at(path.replace("*", "x"))]


ROLLS_OWN = [key for key in KEYS if not fields(key) and key != "defaults"]


@pytest.mark.parametrize("key", ROLLS_OWN)
def test_null_is_as_if_the_key_were_not_there(key):
    path = concrete(key)
    data = of_roll(use_kl_loss=True, reference={}) if path.startswith("reference") else of_roll()
    translated, named = run(put(data, path, None))
    assert at(translated, path) is ABSENT
    assert "roll-unread" not in named
    assert "roll-unsupported" not in named


def rows_of(kind: type) -> list[Row]:
    return [row for row in ALL_ROWS if isinstance(row.treatment, kind)]


def test_what_is_called_the_same_exists():
    for key in (key for row in rows_of(Same) for key in row.keys):
        assert fields(key), key


def test_what_is_dropped_is_no_field_of_ours():
    for key in (key for kind in (Off, Unread, Moved) for row in rows_of(kind) for key in row.keys):
        assert not fields(key), key


def test_what_is_moved_arrives_at_a_field():
    for row in rows_of(Moved):
        assert fields(row.treatment.to.replace("<role>", "actor_train")), row


def test_the_page_is_fresh():
    assert PAGE.read_text() == render_from_roll(), "run make docs"


def test_the_page_names_every_key():
    text = render_from_roll()
    assert all(f"`{sign}`" in text for sign in SIGNS)
    for row in ALL_ROWS:
        assert all(f"{key.rpartition('.')[2]}`" in text for key in row.keys), row
        assert row.treatment.describe().replace("|", "\\|") in text
