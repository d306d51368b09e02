"""Whole files written for ROLL, and roll_r3's own files, unchanged by translation."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import ABSENT, Origins, render
from roll_r3.config.load import load
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.strategies import Fsdp2Config, VllmConfig
from roll_r3.from_roll.roll_dialect import ROLL
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import FILES, FOLDER, ROOT, at, load_text, of_roll, put, read, run


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_whole_file_becomes_a_configuration(path):
    data, places = read(path)
    translated, _, findings = translate(data, places)
    config = RLVRConfig.model_validate(translated)
    assert config.device_type == "cuda", "ROLL runs on GPUs"
    found = check_rules(config)
    assert [f.rule for f in found if f.severity == "error"] == {"vllm": ["gpus-not-shared"]}.get(path.stem, [])
    assert all(f.rule != "truncated-sampling" for f in found), "what ROLL samples by default is exact"
    assert sum(f.rule == "roll-unsupported" for f in findings) == (path.stem == "deepspeed")
    assert sum(f.rule == "roll-unread" for f in findings) == 1
    said = [f for f in findings if f.rule in ("roll-translated", "roll-defaults")]
    assert {f.severity for f in said} == {"note"} | {"warning" for f in said if f.path.endswith("llm_judge.worker_cls")}


def test_the_sglang_file_means_what_it_meant():
    config = RLVRConfig.model_validate(translate(*read(FOLDER / "sglang.yaml"))[0])
    assert (config.adv_estimator, config.advantage_clip) == ("reinforce", 2.0)
    assert (config.norm_mean_type, config.norm_std_type) == ("group", "group")
    assert (config.clip_range, config.dual_clip_loss) == ((0.2, 0.28), 1.4)
    assert (config.use_kl_loss, config.kl_loss_coef, config.kl_estimator) == (True, 0.002, "k3")
    assert (config.rollout_correction.is_weight, config.rollout_correction.is_cap) == ("token", 2.0)
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
    assert config.actor_train.data_args.domain == "tag", "the start says which tags fall to math_rule"


def test_the_vllm_file_means_what_it_meant():
    data, places = read(FOLDER / "vllm.yaml")
    translated, _, findings = translate(data, places)
    config = RLVRConfig.model_validate(translated)
    assert (config.adv_estimator, config.norm_mean_type, config.norm_std_type) == ("reinforce", None, None)
    assert (config.reward_clip, config.advantage_clip, config.dual_clip_loss) == (10, 2.0, 1.4)
    assert config.whiten_advantages
    assert config.max_len_mask
    assert (config.difficulty_mask, config.difficulty_low_threshold) == (True, 0.1)
    assert config.actor_train.data_args.domain_interleave_probs == {"math_rule": 0.6, "code_sandbox": 0.4}
    assert {name: reward.reward for name, reward in config.rewards.items()} == {
        "math_rule": "math",
        "code_sandbox": "code",
    }
    assert config.rewards["math_rule"].filter_groups.kind == "mean"
    assert (config.track_with, config.tracker_kwargs) == (("wandb",), {"wandb": {"project": "rlvr"}})
    assert config.system_envs == {"WANDB_API_KEY": "secret-of-the-user"}
    assert config.actor_infer.strategy_args.strategy_config.host == "0.0.0.0", "its roles span nodes"
    assert at(translated, "actor_infer.strategy_args") == {
        "strategy_name": "vllm",
        "strategy_config": {
            "gpu_memory_utilization": 0.85, "tp_size": 2, "weight_bucket_mb": 2048, "host": "0.0.0.0",
        },
    }  # fmt: skip
    assert (config.response_length, config.reference) == (4096, None)
    budgets = config.actor_train
    assert (budgets.max_tokens_per_microbatch_in_train, budgets.max_tokens_per_microbatch_in_infer) == (8192, 16384)
    assert "secret-of-the-user" not in render(findings, Origins("vllm.yaml", places))


def test_the_stock_file_loads_unchanged():
    loaded = load(FOLDER / "stock.yaml", translator=ROLL)
    config = loaded.config
    warnings = [f.path for f in loaded.findings if f.severity == "warning" and f.rule != "roll-unread"]
    assert warnings == ["rewards.llm_judge.worker_cls"], "a server to start"
    assert not [f for f in check_rules(config) if f.severity == "error"]
    assert config.system_envs == {"NCCL_DEBUG": "WARN"}
    assert (config.adv_estimator, config.norm_mean_type, config.norm_std_type) == ("reinforce", None, None)
    assert (config.reward_clip, config.advantage_clip, config.dual_clip_loss) == (10, 2.0, 1.4)
    assert (config.whiten_advantages, config.max_len_mask, config.difficulty_mask) == (True, True, True)
    shares = config.actor_train.data_args.domain_interleave_probs
    assert shares == {"math_rule": 0.4, "code_sandbox": 0.3, "llm_judge": 0.1, "crossthinkqa": 0.1, "ifeval": 0.1}
    rules = {name: reward.reward for name, reward in config.rewards.items()}
    assert rules == {
        "crossthinkqa": "multiple_choice",
        "ifeval": "ifeval",
        "math_rule": "math",
        "code_sandbox": "code",
        "llm_judge": "llm_judge",
    }
    assert config.rewards["code_sandbox"].filter_groups.kind == "std"
    judge = config.rewards["llm_judge"].judge
    assert (judge.model, judge.max_tokens, judge.temperature) == ("some/judge", 100, 0.8)
    assert (config.eval_steps, config.validation.data_args.messages, config.validation.data_args.domain) == (
        20,
        "messages",
        "tag",
    )
    assert config.validation.generating_args.top_k == 50


MISSING = {
    "gamma": 0.9,
    "async_generation_ratio": 1,
    "whiten_rewards": True,
    "actor_train.model_args.lora_target": "all-linear",
    "rewards.code_sandbox.use_local": False,
}


def test_what_is_missing_is_named_all_at_once():
    data, places = read(FOLDER / "vllm.yaml")
    for key, value in MISSING.items():
        data = put(data, key, value)
    translated, _, findings = translate(data, places)
    (refused,) = [f for f in findings if f.rule == "roll-unsupported"]
    assert refused.severity == "error"
    expected = {*MISSING, "rewards.code_sandbox.worker_cls"} - {"rewards.code_sandbox.use_local"}
    assert {path for path, _ in refused.found} == expected
    assert all(path in refused.fix for path in expected)
    assert list(translated["rewards"]) == ["math_rule"]
    assert "vllm.yaml:35" in render(findings, Origins("vllm.yaml", {**places, "gamma": "vllm.yaml:35"}))


def test_the_vllm_file_loads_with_devices_of_its_own():
    loaded = load(FOLDER / "vllm.yaml", ["actor_infer.device_mapping=range(16, 28)"], ROLL)
    assert {f.severity for f in loaded.findings} == {"note", "warning"}
    assert not [f for f in check_rules(loaded.config) if f.severity == "error"]
    engine = loaded.config.actor_infer.strategy_args.strategy_config
    assert (type(engine), engine.tp_size, engine.gpu_memory_utilization) == (VllmConfig, 2, 0.85)


def test_a_file_loses_what_is_refused_by_nulls():
    path = FOLDER / "vllm.yaml"
    added = [f"{key}={str(value).lower()}" for key, value in MISSING.items()]
    refused = [f for f in load(path, added, ROLL).findings if f.rule == "roll-unsupported"]
    gone = [key for finding in refused for key, _ in finding.found if not key.endswith("worker_cls")]
    assert len(gone) == len(MISSING) - 1
    shares = "actor_train.data_args.domain_interleave_probs={math_rule: 1.0}"
    nulls = [*added, *(f"{key}=null" for key in gone), "rewards.code_sandbox=null", shares]
    assert not [f for f in load(path, nulls, ROLL).findings if f.severity == "error"]


@pytest.mark.parametrize("key", ["reward_clip", "hydra"])
def test_a_key_of_rolls_can_be_removed_from_a_file_without_it(key):
    assert not load_text(MINIMAL, "run.yaml", [f"{key}=null"]).findings


def test_the_fsdp2_file_means_what_it_meant():
    config = load(FOLDER / "fsdp2.yaml", translator=ROLL).config
    assert config.actor_train.strategy_args.strategy_config == Fsdp2Config(recompute=True)
    assert config.actor_train.model_args.dtype == "bf16"
    assert config.reference is not None
    assert config.reference.strategy_args.strategy_name == "fsdp2_infer"
    engine = config.actor_infer.strategy_args.strategy_config
    assert (engine.tp_size, engine.context_length, engine.max_running_requests) == (4, 4096, 128)
    assert engine.server_args == {"max_num_batched_tokens": 8192, "enforce_eager": False}
    assert engine.weight_bucket_mb == 1024


def test_the_deepspeed_file_is_refused_for_deepspeed_and_lora_only():
    data, places = read(FOLDER / "deepspeed.yaml")
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
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
        "loss_agg_mode": "seq-mean-token-sum-norm",
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
