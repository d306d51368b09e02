"""Translation of ROLL's keys, one by one."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import ENGINE, LAYOUT, MATH, at, of_roll, put, run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # lengths
        ({"sequence_length": 4096}, {"response_length": 3072, "sequence_length": ABSENT}),
        ({"sequence_length": 4096, "prompt_length": 96, "response_length": 7}, {"response_length": 4000}),
        # tracking
        ({"track_with": "tensorboard"}, {"track_with": ["tensorboard"]}),
        ({"track_with": "stdout"}, {"track_with": []}),
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
        (
            {"add_token_level_kl": False, "init_kl_coef": 0.2, "kl_penalty": "full", "target_kl": 6},
            {"init_kl_coef": ABSENT, "kl_penalty": ABSENT, "target_kl": ABSENT, "add_token_level_kl": False},
        ),
        (
            {"add_token_level_kl": True, "kl_penalty": "kl", "target_kl": None, "kl_horizon": 9, "reference": {}},
            {
                "add_token_level_kl": True,
                "kl_penalty": "k1",
                "init_kl_coef": 0.2,
                "reference": {},
                "kl_horizon": ABSENT,
            },
        ),
        (
            {"add_token_level_kl": True, "kl_penalty": "mse", "init_kl_coef": 0.1},
            {"kl_penalty": "k2", "init_kl_coef": 0.1},
        ),
        ({"add_token_level_kl": True, "kl_penalty": "abs"}, {"kl_penalty": "abs"}),
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 500},
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 500},
        ),
        # the optimizer
        ({"max_grad_norm": 0.3}, {"actor_train.training_args.max_grad_norm": 0.3, "max_grad_norm": ABSENT}),
        (
            {"actor_train__training_args__lr_scheduler_type": "constant_with_warmup"},
            {"actor_train.training_args.lr_scheduler_type": "constant"},
        ),
        (
            {
                "actor_train__training_args__lr_scheduler_type": "cosine_with_min_lr",
                "actor_train__training_args__lr_scheduler_kwargs": {"min_lr": 1e-7},
            },
            {
                "actor_train.training_args.lr_scheduler_type": "cosine",
                "actor_train.training_args.min_lr": 1e-7,
                "actor_train.training_args.lr_scheduler_kwargs": ABSENT,
            },
        ),
        (
            {
                "actor_train__training_args__lr_scheduler_type": "constant",
                "actor_train__training_args__lr_scheduler_kwargs": {"min_lr": 1e-7},
            },
            {
                "actor_train.training_args.min_lr": ABSENT,
                "actor_train.training_args.lr_scheduler_kwargs": ABSENT,
            },
        ),
        (
            {"enable_old_logprobs_recompute": True},
            {"enable_old_logprobs_recompute": ABSENT, "force_on_policy_ratio": False},
        ),
        (
            {"enable_old_logprobs_recompute": False},
            {"enable_old_logprobs_recompute": ABSENT, "force_on_policy_ratio": ABSENT},
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
            {"rewards.math_rule": {"reward": "math"}, "actor_train.data_args.domain": "source"},
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
        ({"adv_estimator": "reinforce", "norm_mean_type": "running"}, "norm_mean_type"),
        ({"gamma": 0.9}, "gamma"),
        ({"gamma": True}, "gamma"),
        ({"add_token_level_kl": True, "kl_penalty": "full"}, "kl_penalty"),
        ({"add_token_level_kl": True, "target_kl": 6}, "target_kl"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_agg_mode"),
        ({"dataset_filter": 3}, "dataset_filter"),
        ({"norm_mean_type": "batch", "adv_estimator": "gigpo"}, "adv_estimator"),
        ({"async_generation_ratio": 1}, "async_generation_ratio"),
        ({"critic_warmup": 3}, "critic_warmup"),
        ({"dataset_filter": {"min_difficulty": 0.2}}, "dataset_filter"),
        ({"rollout_mock": {"enable": True}}, "rollout_mock"),
        ({"auto_resume": "some/where"}, "auto_resume"),
        ({"checkpoint_config": {"type": "oss", "output_dir": "x"}}, "checkpoint_config.type"),
        ({"actor_train__worker_cls": "roll.pipeline.rlvr.actor_pg_worker.ActorPGWorker"}, "actor_train.worker_cls"),
        ({"actor_train__data_args__template": "chatml"}, "actor_train.data_args.template"),
        (
            {"actor_train__data_args__messages": ABSENT, "actor_train__data_args__prompt": "p"},
            "actor_train.data_args.prompt",
        ),
        ({"actor_train__training_args__warmup_ratio": 0.1}, "actor_train.training_args.warmup_ratio"),
        (
            {"actor_train__training_args__lr_scheduler_kwargs": {"min_lr": 1e-7, "init_lr": 1e-8}},
            "actor_train.training_args.lr_scheduler_kwargs",
        ),
        ({f"{ENGINE}.enable_fp32_lm_head": True}, f"{ENGINE}.enable_fp32_lm_head"),
        ({"actor_infer__generating_args__num_beams": 4}, "actor_infer.generating_args.num_beams"),
        ({"actor_infer__generating_args__repetition_penalty": 1.1}, "actor_infer.generating_args.repetition_penalty"),
        ({"actor_infer__num_gpus_per_worker": 4, f"{ENGINE}.tp_size": 2}, "actor_infer.num_gpus_per_worker"),
        ({LAYOUT: {"moe_layer_recompute": True, "recompute_granularity": "full"}}, f"{LAYOUT}.moe_layer_recompute"),
        ({LAYOUT: {"fp8": "e4m3"}}, f"{LAYOUT}.fp8"),
        ({"rewards__judge__worker_cls": "x.LLMJudgeRewardWorker"}, "rewards.judge.worker_cls"),
        ({"rewards__seen__worker_cls": "x.DetectionRewardWorker"}, "rewards.seen.worker_cls"),
        ({"reward_scale": 2.0}, "reward_scale"),
        ({"error_max_len_clip": True}, "error_max_len_clip"),
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
        {"checkpoint_config": {}, "resume_from_checkpoint": False, "auto_resume": False, "system_envs": {}},
        {"checkpoint_config": {"type": "file_system"}, "resume_from_checkpoint": "", "max_ckpt_to_keep": 0},
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


def test_checkpoints_are_asked_for_by_rolls_names():
    translated, named = run(
        of_roll(
            save_steps=100,
            max_ckpt_to_keep=3,
            checkpoint_config={"type": "file_system", "output_dir": "models"},
            resume_from_checkpoint="some/where",
        )
    )
    config = RLVRConfig.model_validate(translated)
    assert (config.save_steps, config.max_ckpt_to_keep) == (100, 3)
    assert config.checkpoint_config.output_dir == "models"
    assert config.resume_from_checkpoint == "some/where"
    assert named == run(of_roll())[1]


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "auto_resume"])
def test_rolls_newest_checkpoint_is_auto(key):
    translated, named = run(of_roll(**{key: True}))
    assert RLVRConfig.model_validate(translated).resume_from_checkpoint == "auto"
    assert key in named["roll-translated"]


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


def test_a_budget_of_rolls_says_that_steps_keep_their_samples():
    _, named = run(of_roll(actor_train__use_dynamic_batching_in_train=True))
    assert "actor_train.use_dynamic_batching_in_train" in named["roll-translated"]
    packed = {"algorithm": "load_balance", "max_packed_sequence_length_train": 64}
    _, named = run(of_roll(actor_train__use_sequence_packing=True, actor_train__sequence_packing_args=packed))
    assert "actor_train.use_dynamic_batching_in_train" not in named["roll-translated"]


VLLM = {"actor_infer__strategy_args__strategy_name": "vllm"}
FSDP2 = {"actor_train__strategy_args__strategy_name": "fsdp2_train"}


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ({f"{LAYOUT}.bf16": True}, f"{LAYOUT}.bf16"),
        ({f"{LAYOUT}.bf16": False, "actor_train__model_args__dtype": "fp32"}, f"{LAYOUT}.bf16"),
        ({f"{LAYOUT}.additional_configs": {"moe_permute_fusion": True}}, f"{LAYOUT}.moe_permute_fusion"),
        (FSDP2 | {f"{LAYOUT}.ep_size": 8}, f"{LAYOUT}.ep_size"),
        (FSDP2 | {f"{LAYOUT}.efsdp_size": 4}, f"{LAYOUT}.efsdp_size"),
        (FSDP2 | {f"{LAYOUT}.moe_use_grouped_mm": False}, f"{LAYOUT}.moe_use_grouped_mm"),
        (VLLM | {f"{ENGINE}.cuda_graph_sizes": [1, 2]}, f"{ENGINE}.cuda_graph_sizes"),
        (VLLM | {f"{ENGINE}.cudagraph_capture_sizes": [1, 2]}, f"{ENGINE}.cudagraph_capture_sizes"),
        (VLLM | {f"{ENGINE}.disable_mm_preprocessor_cache": True}, f"{ENGINE}.disable_mm_preprocessor_cache"),
        ({"offload_nccl": False}, "offload_nccl"),
        ({"track_with": "ml_tracker"}, "track_with"),
        ({"track_with": "a_new_one"}, "track_with"),
        ({"reference": {}}, "reference"),
        ({"value_clip": 0.5, "lambd": 0.9, "critic": {}}, "critic"),
    ],
)
def test_what_changes_no_training_is_dropped_with_the_others(changes, dropped):
    translated, named = run(of_roll(**changes))
    assert dropped in named["roll-unread"]
    assert "roll-unsupported" not in named
    assert at(translated, dropped) is ABSENT
    RLVRConfig.model_validate(translated)


def test_bf16_beside_the_layout_goes_before_the_models_dtype():
    for written in (ABSENT, "bf16"):
        translated, named = run(of_roll(**{f"{LAYOUT}.bf16": False, "actor_train__model_args__dtype": written}))
        assert at(translated, "actor_train.model_args.dtype") == "fp32"
        assert f"{LAYOUT}.bf16" in named["roll-translated"]
    translated, _ = run(of_roll(**{f"{LAYOUT}.bf16": True, "actor_train__model_args__dtype": "fp32"}))
    assert at(translated, "actor_train.model_args.dtype") == "bf16"


def test_additional_settings_of_megatron_are_treated_as_those_beside_them():
    settings = {
        "moe_aux_loss_coeff": 0.5,
        "fp8": "e4m3",
        "num_layers_in_first_pipeline_stage": 3,
        "expert_model_parallel_size": 4,
        "rotary_interleaved": True,
    }
    translated, named = run(
        of_roll(**{f"{LAYOUT}.additional_configs": settings, f"{LAYOUT}.expert_model_parallel_size": 2})
    )
    assert at(translated, LAYOUT) == {
        "moe_aux_loss_coeff": 0.5,
        "num_layers_in_first_pipeline_stage": 3,
        "expert_model_parallel_size": 2,
    }
    assert set(named["roll-unsupported"]) == {f"{LAYOUT}.fp8", f"{LAYOUT}.additional_configs.rotary_interleaved"}
    assert named["roll-unread"] == (f"{LAYOUT}.additional_configs.expert_model_parallel_size",)
    assert (
        f"{LAYOUT}.additional_configs"
        in run(of_roll(**{f"{LAYOUT}.additional_configs": "a.json"}))[1]["roll-unsupported"]
    )


@pytest.mark.parametrize("estimator", ["gae", "skip_obs_gae", ABSENT])
def test_what_belongs_to_gae_is_refused_with_it(estimator):
    _, named = run(of_roll(adv_estimator=estimator, critic={"model_args": {}}, lambd=0.9, value_clip=0.5))
    assert {"adv_estimator", "critic", "lambd", "value_clip"} <= set(named["roll-unsupported"])
    assert "roll-unread" not in named


def reason(path: str, value: object) -> str:
    """Return the reason for rejecting a key."""
    (finding,) = [f for f in translate(put(of_roll(), path, value), {})[2] if f.rule == "roll-unsupported"]
    return finding.fix


def test_reasons_are_those_of_the_key():
    assert "LoRA" not in reason("actor_train.model_args.freeze_module_prefix", "vision_model")
    assert "frozen" in reason("actor_train.model_args.freeze_module_prefix", "vision_model")
    assert "LoRA" in reason("actor_train.model_args.lora_target", "all-linear")
    for key in ("image_max_pixels", "video_fps", "audio_folder", "custom_data_kwargs_func"):
        assert "prompts are text" in reason(f"actor_train.data_args.{key}", 3)


def test_a_tracker_in_a_file_of_our_own_is_left_to_the_models():
    assert run({"track_with": "wandb"}) == ({"track_with": "wandb"}, {})
