"""Translation of ROLL's recipes: norms, masks, losses, corrections, mixtures, evaluation, trackers."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.findings.report import ABSENT
from tests.unit.from_roll.cases import at, of_roll, put, run

PG = "roll.pipeline.rlvr.actor_pg_worker.ActorPGWorker"
CORRECTION = "rollout_correction"


def variant(name: str, **changes: Any) -> dict[str, Any]:
    """Return changes to a file for ROLL's policy-gradient worker."""
    return {"actor_train__worker_cls": PG, "actor_train__pg_variant": name, **changes}


def band(level: str, statistic: str, low: float, high: float) -> dict[str, Any]:
    return {"level": level, "statistic": statistic, "low": low, "high": high}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # advantages
        ({"adv_estimator": "grpo", "norm_mean_type": None}, {"adv_estimator": "grpo", "norm_mean_type": ABSENT}),
        ({"adv_estimator": "grpo", "norm_mean_type": "batch"}, {"norm_mean_type": ABSENT}),
        (
            {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": "None"},
            {"adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": None},
        ),
        ({"adv_estimator": "reinforce"}, {"norm_mean_type": None, "norm_std_type": ABSENT}),
        ({"reward_clip": 10, "advantage_clip": 2.0}, {"reward_clip": 10, "advantage_clip": 2.0}),
        ({"reward_clip": 0}, {"reward_clip": ABSENT}),
        ({"reward_shift": False, "reward_scale": False}, {"reward_shift": ABSENT, "reward_scale": ABSENT}),
        ({"reward_norm": "batch"}, {"reward_norm": ABSENT}),
        ({"whiten_advantages": True, "max_len_mask": True}, {"whiten_advantages": True, "max_len_mask": True}),
        (
            {"difficulty_mask": True, "difficulty_low_threshold": 0.1},
            {"difficulty_mask": True, "difficulty_low_threshold": 0.1},
        ),
        ({"difficulty_mask": False, "difficulty_low_threshold": 0.1}, {"difficulty_low_threshold": ABSENT}),
        (
            {"difficulty_mask": True, "difficulty_low_threshold": 0.1, "num_return_sequences_in_group": 1},
            {"difficulty_mask": False, "difficulty_low_threshold": ABSENT},
        ),
        # the loss
        (variant("ppo", dual_clip_loss=True, pg_clip=0.1), {"pg_variant": "ppo", "dual_clip_loss": 1.2}),
        (
            variant("vanilla", dual_clip_loss=True, pg_clip=0.1, importance_sampling="seq"),
            {"pg_variant": "vanilla", "dual_clip_loss": ABSENT, "pg_clip": ABSENT, "importance_sampling": ABSENT},
        ),
        (variant("tis", actor_train__tis_upper_bound=2.0), {"pg_variant": "tis", "pg_args": {"tis_upper_bound": 2.0}}),
        (
            variant("topr", actor_train__topr_negative_weight=0.5, actor_train__kimi15_tau=0.3),
            {"pg_args": {"topr_negative_weight": 0.5}, "actor_train.kimi15_tau": ABSENT},
        ),
        (
            variant("cispo", use_pg_clip_range=True, pg_clip_high=0.4),
            {"pg_variant": "cispo", "pg_clip_low": 0.1, "pg_clip_high": 0.1, "pg_args": ABSENT},
        ),
        (
            variant("cispo", actor_train__cispo_epsilon_high=0.3, actor_train__cispo_use_unified_mask=True),
            {"pg_clip_low": 0.1, "pg_clip_high": 0.3, "pg_args": {"cispo_use_unified_mask": True}},
        ),
        (variant("kimi15", actor_train__kimi15_tau=0.2), {"pg_args": {"kimi15_tau": 0.2}}),
        (
            {"pg_variant": "topr", "actor_train__pg_variant": "topr"},
            {"pg_variant": ABSENT, "actor_train.pg_variant": ABSENT},
        ),
        ({"importance_sampling": "seq"}, {"importance_sampling": "seq"}),
        # corrections
        (
            {"train_infer_correction": {"is_weight": {"enabled": True}}},
            {CORRECTION: {"is_weight": "token", "is_cap": 1.2}, "train_infer_correction": ABSENT},
        ),
        (
            {"train_infer_correction": {"is_weight": {"enabled": True, "weight_type": "segment", "upper_bound": None}}},
            {CORRECTION: {"is_weight": "geometric", "is_cap": None}},
        ),
        ({"train_infer_correction": {"is_weight": {"enabled": False}}}, {CORRECTION: ABSENT}),
        (
            {"train_infer_correction": {"filters": [{"enabled": False}, {"enabled": True, "agg_type": "sequence"}]}},
            {CORRECTION: {"filters": [band("sequence", "ratio", 0.8, 1.2)]}, "train_infer_correction": ABSENT},
        ),
        (
            {
                "train_infer_correction": {
                    "filters": [
                        {"enabled": True, "diff_enabled": True, "diff_low": -0.1, "ratio_high": 5},
                        {"enabled": True, "agg_type": "segment", "ratio_enabled": False, "diff_enabled": True},
                        {"enabled": True, "ratio_enabled": False},
                    ]
                }
            },
            {
                CORRECTION: {
                    "filters": [
                        band("token", "ratio", 0.8, 5),
                        band("token", "diff", -0.1, 0.2),
                        band("geometric", "diff", -0.2, 0.2),
                    ]
                }
            },
        ),
        ({"train_infer_correction": {"filters": [{"enabled": False}]}}, {"train_infer_correction": ABSENT}),
        (
            {"use_rollout_importance_sampling_ratio": True, "rollout_importance_sampling_ratio_upper_bound": 3.0},
            {CORRECTION: {"is_weight": "token", "is_cap": 3.0}},
        ),
        (
            {
                "train_infer_ratio_mask": True,
                "train_infer_ratio_threshold_high": 2.0,
                "train_infer_diff_seq_mask": True,
                "train_infer_diff_mask": False,
            },
            {CORRECTION: {"filters": [band("token", "ratio", 0.8, 2.0), band("geometric", "diff", -0.2, 0.2)]}},
        ),
        # samples
        ({"is_use_additional_prompts": True}, {"max_additional_running_prompts": 16}),
        (
            {"use_additional_prompts": True, "max_additional_running_prompts": 4},
            {"max_additional_running_prompts": 4, "use_additional_prompts": ABSENT},
        ),
        ({"max_additional_running_prompts": 4}, {"max_additional_running_prompts": ABSENT}),
        (
            {"actor_train__data_args__domain_interleave_probs": {"math_rule": 0.5, "b": 0.5}},
            {"actor_train.data_args.domain_interleave_probs": {"math_rule": 0.5, "b": 0.5}},
        ),
        (
            {"actor_train__data_args__domain_interleave_probs": {"math_rule": 0.5, "b": 0.1, "c": 0.1}},
            {"actor_train.data_args.domain_interleave_probs": {"math_rule": 0.5, "b": 0.1, "c": 0.4}},
        ),
        # variables
        ({"system_envs": {"USE_MODELSCOPE": "1"}}, {"system_envs": ABSENT}),
        (
            {"system_envs": {"A": "1"}, "reference__system_envs": {"B": "2"}, "use_kl_loss": True},
            {"system_envs": {"A": "1", "B": "2"}, "reference": {}},
        ),
        # trackers
        (
            {"track_with": "wandb", "tracker_kwargs": {"project": "p", "tags": None, "log_dir": "d"}},
            {"track_with": ["wandb"], "tracker_kwargs": {"wandb": {"project": "p", "dir": "d"}}},
        ),
        (
            {"track_with": "swanlab", "tracker_kwargs": {"login_kwargs": {"api_key": "k"}}},
            {"track_with": ["swanlab"], "tracker_kwargs": ABSENT, "system_envs": {"SWANLAB_API_KEY": "k"}},
        ),
        (
            {"track_with": "wandb", "tracker_kwargs": {"api_key": "k"}},
            {"tracker_kwargs": ABSENT, "system_envs": {"WANDB_API_KEY": "k"}},
        ),
        ({"track_with": "tensorboard", "tracker_kwargs": {"log_dir": "d"}}, {"tracker_kwargs": ABSENT}),
    ],
)
def test_a_recipe_becomes_what_it_means(changes, expected):
    translated, named = run(of_roll(**changes))
    assert {path: at(translated, path) for path in expected} == expected
    assert "roll-unsupported" not in named


VALIDATION = {"data_args": {"file_name": "v.jsonl", "template": "qwen3"}, "generating_args": {"temperature": 0.6}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"validation": VALIDATION},
            {
                "eval_steps": 10,
                "validation.data_args": {"file_name": "v.jsonl", "messages": "messages"},
                "validation.generating_args": {"temperature": 0.6, "top_p": 0.7, "top_k": 50},
            },
        ),
        (
            {"validation": put(VALIDATION, "generating_args.num_return_sequences", 4), "eval_steps": 3},
            {"eval_steps": 3, "validation.val_n_sample": 4},
        ),
        (
            {"validation": VALIDATION, "val_prompt_length": 100, "val_sequence_length": 500},
            {"validation.generating_args.max_new_tokens": 400, "val_sequence_length": ABSENT},
        ),
        (
            {"validation": put(VALIDATION, "generating_args.max_new_tokens", 9)},
            {"validation.generating_args.max_new_tokens": ABSENT},
        ),
        (
            {"validation": VALIDATION, "rewards__math_rule__tag_included": ["a"]},
            {"validation.data_args.domain": "tag"},
        ),
        ({"validation": {"generating_args": {}}, "eval_steps": 3}, {"validation": ABSENT, "eval_steps": ABSENT}),
        ({"eval_steps": 3, "val_n_sample": 2, "val_greedy": True}, {"eval_steps": ABSENT, "val_n_sample": ABSENT}),
    ],
)
def test_evaluation_reads_the_columns_of_training(changes, expected):
    translated, named = run(of_roll(**changes))
    assert {path: at(translated, path) for path in expected} == expected
    assert "roll-unsupported" not in named


@pytest.mark.parametrize("worker", [PG, f"{PG}x"])
def test_a_worker_without_a_variant_is_refused(worker):
    _, named = run(of_roll(actor_train__worker_cls=worker))
    assert "actor_train.worker_cls" in named["roll-unsupported"]


def test_samples_of_a_step_stay_where_ranks_shared_them():
    changes = {
        "actor_train__strategy_args__strategy_name": "fsdp2_train",
        "actor_train__model_args__ulysses_size": 4,
        "actor_train__training_args__gradient_accumulation_steps": 8,
    }
    translated, _ = run(of_roll(**changes))
    assert at(translated, "actor_train.training_args.gradient_accumulation_steps") == 2
    assert at(translated, "actor_train.model_args") == {}
    odd = {**changes, "actor_train__training_args__gradient_accumulation_steps": 6}
    assert "actor_train.model_args.ulysses_size" in run(of_roll(**odd))[1]["roll-unsupported"]


def test_two_names_of_a_variable_are_one_mistake():
    _, named = run(of_roll(system_envs={"A": "1"}, actor_infer__system_envs={"A": "2"}))
    assert "actor_infer.system_envs" in named["roll-unsupported"]
