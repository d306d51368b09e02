"""Roles: workers, models, batching."""

from __future__ import annotations

from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Row, Same, Step, Unread, Unsupported, under

_CONFIG = "strategy_args.strategy_config"
_REPLACEMENTS = {
    "actor_train": "write strategy_name: megatron_train, and its layout, or fsdp2_train",
    "actor_infer": "write strategy_name: sglang, vllm or hf_infer",
    "reference": "write strategy_name: megatron_infer, and its layout, or fsdp2_infer",
}
_UNSUPPORTED_STRATEGIES = (
    "deepspeed_train",
    "deepspeed_infer",
    "diffusion_deepspeed_train",
    "hf_infer",
    "mock_infer",
    "veomni_train",
)
_PACKING = (
    "algorithm",
    "max_packed_sequence_length_train",
    "max_packed_sequence_length_forward",
    "min_num_micro_batches_train",
    "min_num_micro_batches_forward",
)
_WORKERS = (
    "roll.pipeline.rlvr.actor_worker.ActorWorker",
    "roll.pipeline.base_worker.ActorWorker",
    "roll.pipeline.base_worker.InferWorker",
)

_FOR_TRANSFORMERS = (
    "disable_gradient_checkpointing gradient_checkpointing_use_reentrant attn_implementation flash_attn device_map "
    "model_config_kwargs ulysses_size vision_dp"
)
"""Keys read by ROLL for models of transformers; under FSDP2 they have their own rows."""


def _unsupported_strategies(draft: Draft) -> None:
    """Reject unsupported strategies, with their settings: no other strategy could read those."""
    for keys in draft.expand("<role>.strategy_args.strategy_name"):
        role, name = str(keys[0]), draft.get(keys)
        if (role, name) == ("actor_infer", "hf_infer"):
            continue
        if (role, name) == ("reference", "hf_infer"):
            why = "transformers computes its log-probabilities, with weights sharded over the devices"
            draft.translate(keys, {keys: "fsdp2_infer"}, why)
        elif isinstance(name, str) and (name in _UNSUPPORTED_STRATEGIES or name.startswith("deepspeed")):
            draft.refuse(keys, _REPLACEMENTS[role])
            draft.drop((role, "strategy_args"))
    for keys in draft.expand(f"<role>.{_CONFIG}"):
        if draft.is_rolls and draft.get(keys) is None:
            draft.drop(keys)


def _steps(draft: Draft) -> None:
    """Note the meaning of a token budget: in ROLL it changes the samples of an optimizer step, here it does not."""
    key = "actor_train.use_dynamic_batching_in_train"
    if draft.is_rolls and draft.get(key) is True:
        why = (
            "the budget cuts micro-batches, but an optimizer step keeps its samples (per_device_train_batch_size x "
            "gradient_accumulation_steps x data-parallel size); in ROLL it has gradient_accumulation_steps "
            "micro-batches, with any number of samples"
        )
        draft.translate(key, {key: True}, why)


def _packing(draft: Draft) -> None:
    """Translate ROLL's packing under load_balance to dynamic batching, which packs by a token budget here."""
    for keys in draft.expand("<role>.sequence_packing_args"):
        role, args = keys[0], draft.get(keys)
        budgets = _budgets(draft, str(role), args) if isinstance(args, dict) else {}
        for target in budgets:
            if draft.get(target) in (False, None):  # off in ROLL's other form of a token budget
                draft.drop(target)
        if budgets:
            draft.translate(keys, budgets, "a token budget: micro-batches are packed up to this number of tokens")
        else:
            draft.unread(keys)
        draft.keep_unknown(keys, args, _PACKING)


def _budgets(draft: Draft, role: str, args: dict[str, Any]) -> dict[str | Keys, Any]:
    if draft.get((role, "use_sequence_packing")) is not True or args.get("algorithm") != "load_balance":
        return {}
    passes = {"infer": args.get("max_packed_sequence_length_forward")}
    if role == "actor_train":
        passes["train"] = args.get("max_packed_sequence_length_train")
    return {
        (role, key): value
        for name, tokens in passes.items()
        if tokens is not None
        for key, value in (
            (f"use_dynamic_batching_in_{name}", True),
            (f"max_tokens_per_microbatch_in_{name}", tokens),
        )
    }


def _batching(draft: Draft) -> None:
    """Drop settings of micro-batches that are not read in the chosen mode."""
    if not draft.is_rolls:
        return
    for role in ("actor_train", "reference"):
        for name in ("train", "infer"):
            budget = (role, f"max_tokens_per_microbatch_in_{name}")
            if draft.get((role, f"use_dynamic_batching_in_{name}")) in (False, ABSENT):
                draft.unread(budget, empty=(None, 0))
        if draft.get((role, "use_dynamic_batching_in_infer")) is True:
            draft.unread((role, "infer_batch_size"))
    draft.unread("actor_infer.infer_batch_size")


STEPS: tuple[Step, ...] = (_unsupported_strategies, _steps, _packing, _batching)

ROWS = (
    Row(
        under("<role>.strategy_args", "strategy_name"),
        ByStep(
            "the same: `megatron_train`, `megatron_infer`, `fsdp2_train`, `fsdp2_infer`, `sglang`, `vllm`, and "
            "`hf_infer` for the rollout; for the reference that is `fsdp2_infer`. DeepSpeed is not supported"
        ),
    ),
    Row(under("<role>", "device_mapping router_replay use_sequence_packing"), Same()),
    Row(
        under("<role>", "infer_batch_size"),
        ByStep("the same; no effect for `actor_infer` or with token budgets"),
    ),
    Row(
        under("<role>", "use_dynamic_batching_in_train max_tokens_per_microbatch_in_train")
        + under("<role>", "use_dynamic_batching_in_infer max_tokens_per_microbatch_in_infer"),
        ByStep("the same, but optimizer steps keep their samples; no effect for `actor_infer`"),
    ),
    Row(
        under("<role>", "sequence_packing_args"),
        ByStep("dynamic batching for `load_balance` with `use_sequence_packing`; else no effect"),
    ),
    Row(
        under("<role>", "worker_cls"),
        Unsupported(_WORKERS, "workers cannot be replaced"),
    ),
    Row(under("<role>", "model_update_frequency"), Unsupported((1,), "every step updates the rollout")),
    Row(under("<role>", "apply_loss_scale"), Unsupported((True,), "the loss covers the whole optimizer step")),
    Row(under("<role>", "mtp_training_mode"), Unsupported(("disabled",), "multi-token prediction is not trained")),
    Row(under("<role>", "tag_included"), Unsupported(([],), "one reference serves all prompts")),
    Row(
        under(
            "<role>",
            "name world_size backend_timeout max_concurrency offload_nccl model_update_method "
            "use_remove_padding use_logits_chunking logits_chunk_size logits_in_fp32 "
            "sequence_length_round_in_train sequence_length_round_in_infer opd_kl_coef",
        )
        + under("actor_infer", "topr_positive_weight topr_negative_weight")
        + under("reference", "topr_positive_weight topr_negative_weight"),
        Unread("implied by devices and layout; log-probabilities are fp32"),
    ),
    Row(
        under("actor_infer", "use_sequence_packing use_dynamic_batching_in_train use_dynamic_batching_in_infer")
        + under("actor_infer", "max_tokens_per_microbatch_in_train max_tokens_per_microbatch_in_infer")
        + under("reference", "use_dynamic_batching_in_train max_tokens_per_microbatch_in_train"),
        Unread("the engine batches itself, the reference does not train"),
    ),
    Row(
        under("actor_infer", "training_args data_args")
        + under("reference", "training_args data_args generating_args")
        + under("actor_train", "generating_args"),
        Unread("only the trainer trains and reads data, only the rollout samples"),
    ),
    Row(under("actor_infer.model_args", "moe_aux_loss_coef"), Unread("the rollout has no loss")),
    Row(under("<role>.model_args", "model_name_or_path dtype"), Same("not `fp16` in the trainer")),
    Row(
        under("<role>.model_args", "lora_target adapter_name_or_path export_dir"),
        Unsupported((), "all weights are trained; there is no LoRA"),
    ),
    Row(
        under("<role>.model_args", "freeze_module_prefix"),
        Unsupported((), "all weights are trained: no part, such as a vision tower, is frozen"),
    ),
    Row(
        under("<trainer>.model_args", _FOR_TRANSFORMERS) + under("actor_infer.model_args", _FOR_TRANSFORMERS),
        Unread("for models of transformers, not Megatron's; see recompute_granularity"),
    ),
    Row(
        under(
            "<role>.model_args",
            "model_type num_labels lora_rank lora_alpha lora_dropout additional_target autocast_adapter_dtype",
        ),
        Unread("read for LoRA and judge models only"),
    ),
)
