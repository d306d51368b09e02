"""What roles declare: workers, models, batching."""

from __future__ import annotations

from typing import Any

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import Joint, Off, Row, Same, Step, Unread, under
from roll_r3.config.tree import Keys

_CONFIG = "strategy_args.strategy_config"
_GONE = {
    "actor_train": "write strategy_name: megatron_train, and its layout, or fsdp2_train",
    "actor_infer": "write strategy_name: sglang, vllm or hf_infer",
    "reference": "write strategy_name: megatron_infer, and its layout, or fsdp2_infer",
}
_STRANGERS = (
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
    "disable_gradient_checkpointing",
    "gradient_checkpointing_use_reentrant",
    "attn_implementation",
    "flash_attn",
    "device_map",
    "model_config_kwargs",
    "ulysses_size",
    "vision_dp",
)
"""What ROLL reads for models of transformers; under FSDP2 they have rows of their own."""


def _strangers(draft: Draft) -> None:
    """Strategies that roll_r3 does not have go with their settings, which no other strategy could read."""
    for keys in draft.expand("<role>.strategy_args.strategy_name"):
        role, name = str(keys[0]), draft.get(keys)
        if (role, name) == ("actor_infer", "hf_infer"):
            continue
        if (role, name) == ("reference", "hf_infer"):
            why = "transformers computes its log-probabilities, and its weights are shared out over the devices"
            draft.translate(keys, {keys: "fsdp2_infer"}, why)
        elif isinstance(name, str) and (name in _STRANGERS or name.startswith("deepspeed")):
            draft.refuse(keys, _GONE[role])
            draft.drop((role, "strategy_args"))
    for keys in draft.expand(f"<role>.{_CONFIG}"):
        if draft.is_rolls and draft.get(keys) is None:
            draft.drop(keys)


def _steps(draft: Draft) -> None:
    """A token budget changes what an optimizer step of ROLL is made of, and here it does not."""
    key = "actor_train.use_dynamic_batching_in_train"
    if draft.is_rolls and draft.get(key) is True:
        why = (
            "the budget cuts micro-batches, but an optimizer step keeps its samples (per_device_train_batch_size x "
            "gradient_accumulation_steps x data-parallel size); ROLL takes gradient_accumulation_steps micro-batches, "
            "however many samples are in them"
        )
        draft.translate(key, {key: True}, why)


def _packing(draft: Draft) -> None:
    """ROLL packs by a token budget under load_balance; here that is dynamic batching."""
    for keys in draft.expand("<role>.sequence_packing_args"):
        role, args = keys[0], draft.get(keys)
        budgets = _budgets(draft, str(role), args) if isinstance(args, dict) else {}
        for target in budgets:
            if draft.get(target) in (False, None):  # off, as far as ROLL's other way to cut by a budget goes
                draft.drop(target)
        if args is None:
            draft.drop(keys)
        elif budgets:
            draft.translate(keys, budgets, "micro-batches are packed up to so many tokens: a token budget")
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
    """Settings of micro-batches that the chosen way of cutting them does not read."""
    if not draft.is_rolls:
        return
    for role in ("actor_train", "reference"):
        for name in ("train", "infer"):
            budget = (role, f"max_tokens_per_microbatch_in_{name}")
            if draft.get((role, f"use_dynamic_batching_in_{name}")) in (False, ABSENT):
                _leave_out(draft, budget, empty=(None, 0))
        if draft.get((role, "use_dynamic_batching_in_infer")) is True:
            _leave_out(draft, (role, "infer_batch_size"))
    _leave_out(draft, ("actor_infer", "infer_batch_size"))


def _leave_out(draft: Draft, keys: Keys, empty: tuple[object, ...] = (None,)) -> None:
    value = draft.get(keys)
    if value in empty:
        draft.drop(keys)
    elif value is not ABSENT:
        draft.unread(keys)


STEPS: tuple[Step, ...] = (_strangers, _steps, _packing, _batching)

_ENVIRONMENT = "set them in the shell that starts the run, and before `ray start` on other nodes"

ROWS = (
    Row(
        under("<role>.strategy_args", "strategy_name"),
        Joint(
            "`megatron_train`, `megatron_infer`, `fsdp2_train`, `fsdp2_infer`, `sglang`, `vllm` are the same, and for "
            "the rollout `hf_infer`, with settings of its own; for the reference that is `fsdp2_infer`; not DeepSpeed"
        ),
    ),
    Row(under("<role>", "device_mapping", "router_replay", "use_sequence_packing"), Same()),
    Row(
        under("<role>", "infer_batch_size"),
        Joint("the same; no effect for `actor_infer`, and none where a token budget cuts micro-batches"),
    ),
    Row(
        under("<role>", "use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train")
        + under("<role>", "use_dynamic_batching_in_infer", "max_tokens_per_microbatch_in_infer"),
        Joint("the same, but an optimizer step keeps its samples, as without a budget; no effect for `actor_infer`"),
    ),
    Row(
        under("<role>", "sequence_packing_args"),
        Joint("under `load_balance` with `use_sequence_packing` a token budget (dynamic batching); else no effect"),
    ),
    Row(
        under("<role>", "worker_cls"),
        Off(_WORKERS, "workers cannot be replaced"),
    ),
    Row(under("<role>", "model_update_frequency"), Off((1,), "the rollout gets new weights in every step")),
    Row(under("<role>", "apply_loss_scale"), Off((True,), "gradients are those of the whole optimizer step's loss")),
    Row(under("<role>", "mtp_training_mode"), Off(("disabled",), "multi-token prediction is not trained")),
    Row(under("<role>", "system_envs"), Off(({},), _ENVIRONMENT)),
    Row(under("<role>", "tag_included"), Off(([],), "there is one reference for all prompts")),
    Row(
        under(
            "<role>",
            "name",
            "world_size",
            "backend_timeout",
            "max_concurrency",
            "offload_nccl",
            "model_update_method",
            "use_remove_padding",
            "use_logits_chunking",
            "logits_chunk_size",
            "logits_in_fp32",
            "sequence_length_round_in_train",
            "sequence_length_round_in_infer",
            "topr_positive_weight",
            "topr_negative_weight",
            "opd_kl_coef",
        ),
        Unread("processes follow from the devices, padding from the layout; log-probabilities are computed in fp32"),
    ),
    Row(
        under("actor_infer", "use_sequence_packing", "use_dynamic_batching_in_train", "use_dynamic_batching_in_infer")
        + under("actor_infer", "max_tokens_per_microbatch_in_train", "max_tokens_per_microbatch_in_infer")
        + under("reference", "use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train"),
        Unread("the engine batches by itself, and the reference does not train"),
    ),
    Row(
        under("actor_infer", "training_args", "data_args")
        + under("reference", "training_args", "data_args", "generating_args")
        + under("actor_train", "generating_args"),
        Unread("the trainer trains and reads the data, the rollout samples"),
    ),
    Row(under("actor_infer.model_args", "moe_aux_loss_coef"), Unread("the rollout has no loss")),
    Row(under("<role>.model_args", "model_name_or_path", "dtype"), Same("not `fp16` in the trainer")),
    Row(
        under("<role>.model_args", "lora_target", "adapter_name_or_path", "export_dir"),
        Off((), "all weights are trained; there is no LoRA"),
    ),
    Row(
        under("<role>.model_args", "freeze_module_prefix"),
        Off((), "all weights are trained: no part of a model, such as a vision tower, is frozen"),
    ),
    Row(
        under("<trainer>.model_args", *_FOR_TRANSFORMERS) + under("actor_infer.model_args", *_FOR_TRANSFORMERS),
        Unread(
            "ROLL reads them for models of transformers, not for Megatron's; recomputation is recompute_granularity"
        ),
    ),
    Row(
        under(
            "<role>.model_args",
            "model_type",
            "num_labels",
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "additional_target",
            "autocast_adapter_dtype",
        ),
        Unread("they are read for LoRA and for models that judge only"),
    ),
)
