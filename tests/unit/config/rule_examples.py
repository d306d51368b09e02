"""Further examples of rules: edges that a rule's own pair of examples leaves open."""

from __future__ import annotations

TRAIN = "actor_train.strategy_args"
ENGINE = "actor_infer.strategy_args"
BATCH = "actor_train.training_args"


def megatron(**settings: object) -> str:
    """Return the override for a layout of actor_train."""
    inner = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"{TRAIN}={{strategy_name: megatron_train, strategy_config: {{{inner}}}}}"


def reference(**settings: object) -> str:
    """Return the override for a reference with this layout."""
    return f"reference.strategy_args={megatron(**settings).partition('=')[2].replace('train', 'infer')}"


def sglang(**settings: object) -> str:
    """Return the override for engine settings of actor_infer."""
    return f"{ENGINE}={megatron(**settings).partition('=')[2].replace('megatron_train', 'sglang')}"


def devices(role: str, number: int) -> str:
    return f"{role}.device_mapping=range({number})"


FSDP2 = f"{TRAIN}.strategy_name=fsdp2_train"
FSDP2_REFERENCE = "reference.strategy_args={strategy_name: fsdp2_infer}"
HF = f"{ENGINE}.strategy_name=hf_infer"
VLLM = f"{ENGINE}.strategy_name=vllm"
TWO_STAGES = {"pipeline_model_parallel_size": 2}
LAYOUT = {"pipeline_model_parallel_layout": "'Ett|ttL'"}
REINFORCE = "adv_estimator=reinforce"
PLUS_PLUS = "reinforce_plus_plus_baseline"
SHORT = ["prompt_length=8", "response_length=9"]  # 16 inputs


def train_budget(tokens: int | str) -> list[str]:
    return [
        "actor_train.use_dynamic_batching_in_train=true",
        f"actor_train.max_tokens_per_microbatch_in_train={tokens}",
    ]


def infer_budget(role: str, tokens: int | str) -> list[str]:
    return [f"{role}.use_dynamic_batching_in_infer=true", f"{role}.max_tokens_per_microbatch_in_infer={tokens}"]


KL = "use_kl_loss=true"
SEQ = ["importance_sampling=seq", "loss_agg_mode=seq-mean-token-mean"]

ALLGATHER = megatron(moe_token_dispatcher_type="allgather", expert_model_parallel_size=2)
REFERENCE_ALLGATHER = [
    devices("reference", 2),
    reference(moe_token_dispatcher_type="allgather", expert_model_parallel_size=2),
    *infer_budget("reference", 4096),
]

Examples = tuple[list[list[str]], list[list[str]]]


def judge(url: str, *fields: str) -> str:
    """Override the rewards by one judge."""
    inside = ", ".join([f"base_url: '{url}'", "model: m", *fields])
    return "rewards={a: {reward: llm_judge, judge: {" + inside + "}}}"


MORE_EXAMPLES: dict[str, Examples] = {
    "filter-fields-unread": (
        [["filter_groups.enable=true", "rewards={a: {reward: math, filter_groups: {enable: true}}}"]],
        [["filter_groups.max_num_gen_batches=3", "rewards={a: {reward: math, filter_groups: {enable: true}}}"]],
    ),
    "reward-names": (
        [["rewards={'': {reward: math}}"], ["rewards={a.b: {reward: math}}"]],
        [["rewards={a/b: {reward: math}}"]],
    ),
    "r3-on-both-sides": ([["actor_infer.router_replay.mode=disable"]], []),
    "reference-routes-by-itself": ([[KL, "reference.router_replay.mode=R2"]], []),
    "no-aux-loss": ([[KL, reference(moe_aux_loss_coeff=0.01)]], []),
    "audit-is-the-trainers": ([[KL, "reference.router_replay.audit=true"]], []),
    "audit-every-unread": (
        [[KL, "reference.router_replay.audit_every=5"]],
        [["actor_train.router_replay.audit_every=10"]],
    ),
    "devices-named": ([["actor_infer.device_mapping=[]"], [KL, "reference.device_mapping=[]"]], []),
    "devices-once": ([["actor_infer.device_mapping=range(2) + range(2)"]], []),
    "devices-over-model-parallel": (
        [
            [devices("actor_train", 3), megatron(context_parallel_size=2)],
            [KL, devices("reference", 3), reference(tensor_model_parallel_size=2)],
        ],
        [],
    ),
    "devices-over-expert-parallel": (
        [
            [devices("actor_train", 4), megatron(expert_model_parallel_size=4, pipeline_model_parallel_size=2)],
            [devices("actor_train", 4), megatron(expert_model_parallel_size=2, expert_tensor_parallel_size=4)],
        ],
        [[devices("actor_train", 4), megatron(expert_model_parallel_size=4, tensor_model_parallel_size=4)]],
    ),
    "experts-split-as-weights": (
        [[devices("actor_train", 2), megatron(expert_tensor_parallel_size=1, tensor_model_parallel_size=2)]],
        [
            [
                devices("actor_train", 2),
                megatron(expert_tensor_parallel_size=1, tensor_model_parallel_size=2, expert_model_parallel_size=2),
            ]
        ],
    ),
    "uneven-stages-need-pp": (
        [
            [megatron(num_layers_in_last_pipeline_stage=3)],
            [megatron(account_for_embedding_in_pipeline_split="true")],
            [megatron(account_for_loss_in_pipeline_split="true")],
            [megatron(pipeline_model_parallel_layout="EttL")],
        ],
        [
            [
                devices("actor_train", 2),
                megatron(num_layers_in_first_pipeline_stage=3, pipeline_model_parallel_size=2),
            ]
        ],
    ),
    "one-way-to-split-layers": (
        [
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT, num_layers_in_last_pipeline_stage=2)],
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT, account_for_loss_in_pipeline_split="true")],
            [
                devices("actor_train", 2),
                megatron(
                    **TWO_STAGES,
                    num_layers_in_last_pipeline_stage=2,
                    account_for_embedding_in_pipeline_split="true",
                ),
            ],
        ],
        [
            [
                devices("actor_train", 2),
                megatron(
                    **TWO_STAGES,
                    account_for_embedding_in_pipeline_split="true",
                    account_for_loss_in_pipeline_split="true",
                ),
            ]
        ],
    ),
    "tp-needs-sp": ([], [[megatron(sequence_parallel="false")]]),
    "engine-devices-over-tp": ([[sglang(tp_size=2)]], [[HF, "actor_infer.device_mapping=range(3)"]]),
    "engine-batch-unread": ([[HF, "actor_infer.infer_batch_size=4"]], []),
    "engine-dtype-unread": (
        [[HF, "actor_infer.model_args.dtype=fp32"]],
        [[HF, f"{ENGINE}.strategy_config.dtype=float32"]],
    ),
    "gpus-not-shared": (
        [
            ["device_type=cuda", "actor_infer.device_mapping=[1]", KL, "reference.device_mapping=[1]"],
            ["device_type=cuda", "actor_infer.device_mapping=[0, 1]", FSDP2],
        ],
        [["device_type=cpu"]],
    ),
    "warmup-within-run": (
        [["max_steps=2", "ppo_epochs=3", f"{BATCH}.warmup_steps=384"]],
        [["max_steps=2", "ppo_epochs=3", f"{BATCH}.warmup_steps=383"]],
    ),
    "forced-ratio-takes-one-step": (
        [
            ["force_on_policy_ratio=true", "ppo_epochs=2", f"{BATCH}.gradient_accumulation_steps=64"],
            ["force_on_policy_ratio=true", f"{BATCH}.gradient_accumulation_steps=32"],
        ],
        [
            ["force_on_policy_ratio=true", f"{BATCH}.gradient_accumulation_steps=64"],
            ["force_on_policy_ratio=auto", "ppo_epochs=2"],
            ["force_on_policy_ratio=false"],
        ],
    ),
    "full-recompute-says-how": (
        [
            [megatron(recompute_granularity="full", recompute_method="block")],
            [megatron(recompute_granularity="full", recompute_num_layers=1)],
        ],
        [],
    ),
    "recompute-method-needs-full": (
        [[megatron(recompute_granularity="selective", recompute_modules="[moe]", recompute_num_layers=1)]],
        [],
    ),
    "recompute-modules-need-selective": (
        [
            [
                megatron(
                    recompute_granularity="full",
                    recompute_method="block",
                    recompute_num_layers=1,
                    recompute_modules="[moe]",
                )
            ]
        ],
        [],
    ),
    "samples-over-ranks": (
        [
            [KL, devices("reference", 5)],
            [FSDP2, devices("actor_train", 5)],
            [KL, FSDP2_REFERENCE, devices("reference", 5)],
        ],
        [[devices("actor_train", 6), megatron(context_parallel_size=3)]],
    ),
    "samples-over-mini-batches": (
        [
            [f"{BATCH}.per_device_train_batch_size=64", devices("actor_train", 2)],
            [f"{BATCH}.per_device_train_batch_size=64", devices("actor_train", 2), FSDP2],
        ],
        [[f"{BATCH}.per_device_train_batch_size=32", devices("actor_train", 2), FSDP2]],
    ),
    "interleaved-micro-batches": (
        [],
        [
            [devices("actor_train", 2), megatron(pipeline_model_parallel_size=2)],
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2),
                *train_budget(4096),
            ],
        ],
    ),
    "train-budget-given": ([["actor_train.use_dynamic_batching_in_train=true"]], []),
    "infer-budget-given": (
        [["actor_train.use_dynamic_batching_in_infer=true"], [KL, "reference.use_dynamic_batching_in_infer=true"]],
        [
            [KL, *infer_budget("reference", 4096)],
            [
                KL,
                "actor_train.use_dynamic_batching_in_train=true",
                "actor_train.max_tokens_per_microbatch_in_train=4096",
                "actor_train.use_dynamic_batching_in_infer=true",
                "reference.use_dynamic_batching_in_infer=true",
            ],
        ],
    ),
    "train-budget-fits-longest": (
        [
            [*SHORT, *train_budget(16), "actor_train.sequence_length_round=3"],
            [*SHORT, *train_budget(16), "actor_train.sequence_length_round=3", FSDP2],
            [*SHORT, *train_budget(16), devices("actor_train", 6), megatron(tensor_model_parallel_size=3)],
            [*SHORT, *train_budget(16), devices("actor_train", 3), megatron(context_parallel_size=3)],
        ],
        [
            [*SHORT, *train_budget(18), "actor_train.sequence_length_round=3"],
            [*SHORT, *train_budget(18), "actor_train.sequence_length_round=3", FSDP2],
        ],
    ),
    "infer-budget-fits-longest": (
        [[*SHORT, KL, *infer_budget("reference", 15)]],
        [[*SHORT, KL, *infer_budget("reference", 16)]],
    ),
    "infer-batch-unread": (
        [
            [FSDP2, *infer_budget("actor_train", 4096), "actor_train.infer_batch_size=4"],
            [KL, *infer_budget("reference", 4096), "reference.infer_batch_size=4"],
        ],
        [],
    ),
    "dynamic-batching-with-allgather": ([[KL, *REFERENCE_ALLGATHER]], [[devices("actor_train", 2), ALLGATHER]]),
    "kl-needs-reference": (
        [["add_token_level_kl=true", "init_kl_coef=0.1"]],
        [["add_token_level_kl=true", "init_kl_coef=0.1", "reference={}"]],
    ),
    "shares-sum-to-one": (
        [
            [
                "rewards.a={reward: math, tag_included: [x]}",
                "rewards.b={reward: math, tag_included: [y]}",
                "rewards.c={reward: math}",
                "actor_train.data_args={file_name: p.jsonl, domain: t}",
                "actor_train.data_args.domain_interleave_probs={a: 1.0, b: 0.005, c: 0.0}",
                "rollout_batch_size=1024",
            ]
        ],
        [],
    ),
    "kl-weighs-nothing": ([["add_token_level_kl=true", "reference={}"]], []),
    "dual-clip-above-one": ([["dual_clip_loss=0.5"]], []),
    "clip-low-below-one": (
        [["pg_clip_low=1"], ["pg_clip=1", "pg_clip_high=0.3"]],
        [["pg_clip=2", "pg_clip_low=0.2"], ["pg_variant=cispo", "pg_clip_low=1"]],
    ),
    "clip-high-clips": ([["pg_clip=11", "pg_clip_low=0.2"]], []),
    "clip-range-unread": (
        [[f"pg_variant={name}", "pg_clip_low=0.1"] for name in ("vanilla", "tis", "topr", "kimi15")],
        [["pg_variant=dppo_tv", "pg_clip=0.15"]],
    ),
    "dual-clip-unread": ([["pg_variant=dppo_tv", "dual_clip_loss=3"], ["pg_variant=vanilla", "dual_clip_loss=3"]], []),
    "sample-ratio-unread": (
        [["pg_variant=kimi15", *SEQ], ["pg_variant=dppo_tv", *SEQ]],
        [[*SEQ, "pg_clip=0.0004"], ["pg_variant=topr", *SEQ], ["pg_variant=tis", *SEQ]],
    ),
    "sample-ratio-clip-is-narrow": ([[*SEQ, "pg_clip_low=0.001"], ["pg_variant=cispo", *SEQ]], []),
    "probability-clip-below-one": ([["pg_variant=dppo_tv", "pg_clip=1", "pg_clip_low=0.1"]], []),
    "ratio-is-one": (
        [
            [*SEQ, "pg_clip=0.01", f"{BATCH}.gradient_accumulation_steps=64"],
            ["pg_clip=0.1", f"{BATCH}.gradient_accumulation_steps=64"],
        ],
        [["pg_variant=kimi15"], ["pg_clip=0.1"], [f"{BATCH}.gradient_accumulation_steps=64"]],
    ),
    "correction-cap-in-range": (
        [["rollout_correction={is_weight: sequence, is_cap: 101}"]],
        [["rollout_correction={is_weight: geometric, is_cap: null}"], ["rollout_correction={is_weight: token}"]],
    ),
    "correction-filter-keeps-agreement": (
        [
            ["rollout_correction.filters=[{high: 0.9}]"],
            ["rollout_correction.filters=[{high: 2}, {statistic: k3, low: 0.1}]"],
        ],
        [["rollout_correction.filters=[{low: 1}, {statistic: diff, level: sequence, low: -3, high: 0}]"]],
    ),
    "correction-filter-bound-unread": (
        [
            ["rollout_correction.filters=[{low: 0, high: 2}]"],
            ["rollout_correction.filters=[{statistic: diff, level: geometric, low: -0.2, high: 1}]"],
        ],
        [["rollout_correction.filters=[{statistic: diff, level: sequence, low: -1, high: 1}]"]],
    ),
    "correction-compares-like-with-like": (
        [
            [
                "actor_infer.strategy_args={strategy_name: vllm}",
                "actor_infer.generating_args={top_p: 0.9, sampling_mask: false}",
                "rollout_correction.bypass=true",
            ]
        ],
        [],
    ),
    "bypass-leaves-nothing-to-correct": (
        [
            ["rollout_correction={bypass: true, filters: [{high: 2}]}"],
            ["rollout_correction={bypass: true, opsm_delta: 0.1}"],
        ],
        [],
    ),
    "kl-penalty-of-both-signs": (
        [["add_token_level_kl=true", "init_kl_coef=0.1", "reference={}", "kl_penalty=abs"]],
        [],
    ),
    "token-sum-meets-clipping": (
        [],
        [["loss_agg_mode=seq-mean-token-sum", "actor_train.training_args.max_grad_norm=0"]],
    ),
    "baseline-needs-groups": (
        [
            *(["num_return_sequences_in_group=1", f"adv_estimator={name}"] for name in ("rloo", PLUS_PLUS)),
            ["num_return_sequences_in_group=1", REINFORCE, "norm_mean_type=group"],
        ],
        [
            ["num_return_sequences_in_group=2"],
            ["num_return_sequences_in_group=1", REINFORCE, "norm_mean_type=null"],
        ],
    ),
    "group-std-needs-group-mean": ([[REINFORCE, "norm_std_type=group", "norm_mean_type=null"]], []),
    "batch-std-needs-mean": ([], [[REINFORCE, "norm_std_type=batch"]]),
    "shift-cancels": (
        [["reward_shift=1", f"adv_estimator={name}"] for name in ("reinforce", "rloo", PLUS_PLUS)],
        [["reward_shift=0"]],
    ),
    "scale-cancels": (
        [
            ["reward_scale=2", REINFORCE, "norm_std_type=batch"],
            ["reward_scale=2", REINFORCE, "whiten_advantages=true"],
            ["reward_scale=2", f"adv_estimator={PLUS_PLUS}"],
        ],
        [
            ["reward_scale=2", REINFORCE],
            ["reward_scale=2", "adv_estimator=rloo"],
            ["reward_scale=2", f"adv_estimator={PLUS_PLUS}", "reward_clip=1"],
            [
                "reward_scale=2",
                f"adv_estimator={PLUS_PLUS}",
                "add_token_level_kl=true",
                "init_kl_coef=1",
                "reference={}",
            ],
        ],
    ),
    "overlong-buffer-fits": (
        [["response_length=100", "actor_infer.generating_args.max_new_tokens=80", "overlong_buffer={len: 20}"]],
        [["response_length=100", "actor_infer.generating_args.max_new_tokens=80", "overlong_buffer={len: 21}"]],
    ),
    "difficulty-thresholds-ordered": (
        [["difficulty_mask=true", "difficulty_low_threshold=0.5", "difficulty_high_threshold=0.5"]],
        [["difficulty_mask=true"]],
    ),
    "already-whitened": (
        [["whiten_advantages=true", f"adv_estimator={PLUS_PLUS}"]],
        [["whiten_advantages=true", "norm_adv_by_std_in_grpo=false"], ["whiten_advantages=true", "adv_estimator=rloo"]],
    ),
    "norm-mean-type-unread": ([["norm_mean_type=null"]], []),
    "top-k-range": ([["actor_infer.generating_args.top_k=-2"]], []),
    "truncated-sampling": (
        [
            ["actor_infer.generating_args={top_p: 0.9, sampling_mask: false}"],
            [VLLM, "actor_infer.generating_args={temperature: 0.8, top_k: 50, sampling_mask: false}"],
        ],
        [
            [VLLM, "actor_infer.generating_args={temperature: 0.8, top_k: 50}"],
            [HF, "actor_infer.generating_args.top_p=0.9"],
        ],
    ),
    "data-named": ([["actor_train.data_args.file_name=''"], ["actor_train.data_args.file_name=[a.jsonl, '']"]], []),
    "reward-known": ([["rewards.default.reward='a.b:'"], ["rewards.default.reward=a b:c"]], []),
    "reward-arguments": (
        [
            ["rewards={a: {reward: code, kwargs: {seconds: 0}}}"],
            ["rewards={a: {reward: code, kwargs: {total_seconds: 9}}}"],
            ["rewards={a: {reward: math, kwargs: {seconds: 9}}}"],
            ["rewards={a: {reward: ifeval, kwargs: {repetition_penalty: -0.5}}}"],
            ["rewards={a: {reward: multiple_choice, kwargs: {response_length_penalty_coef: true}}}"],
        ],
        [["rewards={a: {reward: multiple_choice, kwargs: {reward_type: soft, repetition_penalty: 0.5}}}"]],
    ),
    "reward-text-once": (
        [],
        [
            [
                "rewards={a: {reward: math, tag_included: [x]}, b: {reward: exact_match, skip_special_tokens: false}}",
                "actor_train.data_args={file_name: a, domain: tag}",
            ]
        ],
    ),
    "judge-named": ([["rewards={a: {reward: math, judge: {base_url: http://a, model: m}}}"]], []),
    "judge-address": (
        [
            [judge("ftp://a/v1")],
            [judge("http:///v1")],
            [judge("http://a:99999/v1")],
            [judge("http://user:key@a/v1")],
            [judge("http://a/v1?key=x")],
            [judge("http://a/v1/chat/completions")],
        ],
        [[judge("https://api.example.com/v1")], [judge("http://[::1]:30000/v1/")]],
    ),
    "judge-score": (
        [[judge("http://a", "score: '([0-9'")]],
        [[judge("http://a", "score: boxed")]],
    ),
    "judge-question": (
        [[judge("http://a", "prompt: 'Is {reponse} right?'")]],
        [[judge("http://a", "prompt: rating")]],
    ),
    "kl-loss-coef-unread": ([], [["kl_loss_coef=0.001"]]),
    "reference-only-infers": (
        [
            [KL, reference(overlap_grad_reduce="true")],
            [KL, reference(moe_router_bias_update_rate=0.001)],
            [KL, f"{FSDP2_REFERENCE[:-1]}, strategy_config: {{recompute: true}}}}"],
        ],
        [[KL, "reference={}"], [KL, FSDP2_REFERENCE], [FSDP2, f"{TRAIN}.strategy_config.recompute=true"]],
    ),
}
