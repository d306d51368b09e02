"""FSDP2, the trainer of transformers' models."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import By, Joint, Off, Row, Same, Step, Unread, under
from roll_r3.config.tree import Keys

_FSDP2 = "<fsdp2>.strategy_args.strategy_config"
_PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}
_ATTENTION = ("sdpa", "eager")


def _precision(draft: Draft) -> None:
    """ROLL computes in param_dtype, or else in bf16, whatever model_args.dtype says."""
    for role, *_ in draft.expand("<fsdp2>"):
        ours, theirs = (role, "model_args", "dtype"), (role, "strategy_args", "strategy_config", "param_dtype")
        written = draft.get(theirs)
        meant = _PRECISIONS.get(written.lower()) if isinstance(written, str) else None
        if draft.is_rolls and draft.has(ours) and draft.get(ours) != (meant or "bf16"):
            draft.unread(ours)
        if written is None:
            draft.drop(theirs)
        elif meant is not None:
            draft.translate(theirs, {ours: meant}, "what the model computes in; weights and gradients are fp32")
        elif written is not ABSENT:
            draft.refuse(theirs, "the trainer computes in bf16 or fp32")


def _recompute(draft: Draft, keys: Keys) -> None:
    disabled = draft.get(keys)
    if disabled is None:
        draft.drop(keys)
    elif keys[0] != "actor_train":
        draft.unread(keys)
    elif isinstance(disabled, bool):
        target = ("actor_train", "strategy_args", "strategy_config", "recompute")
        draft.translate(keys, {target: not disabled}, "whether layers are recomputed in backward")


def _attention(draft: Draft, keys: Keys) -> None:
    name = draft.get(keys)
    if name is None:
        draft.drop(keys)
    elif name in _ATTENTION:
        target = (keys[0], "strategy_args", "strategy_config", "attn_implementation")
        draft.translate(keys, {target: name}, "transformers' attention function")
    else:
        draft.unread(keys)


STEPS: tuple[Step, ...] = (_precision,)

ROWS = (
    Row(under(_FSDP2, "reshard_after_forward"), Same()),
    Row(
        under(_FSDP2, "param_dtype"),
        Joint(
            "`<role>.model_args.dtype`, which ROLL does not read under FSDP2: it computes in `bf16` unless told here"
        ),
    ),
    Row(
        under("<fsdp2>.model_args", "disable_gradient_checkpointing"),
        By(_recompute, "`strategy_config.recompute`, its opposite; no effect for the reference, which has no backward"),
    ),
    Row(
        under("<fsdp2>.model_args", "attn_implementation"),
        By(_attention, "`strategy_config.attn_implementation` for `sdpa` and `eager`; others have no effect"),
    ),
    Row(
        under(_FSDP2, "fsdp_size", "ep_size", "efsdp_size", "wrap_policy", "apply_expert_patch", "moe_use_grouped_mm"),
        Unread("every device holds its part of each weight, and gathers whole decoder layers with all their experts"),
    ),
    Row(
        under(_FSDP2, "reduce_dtype", "reduce_scatter_during_grad_accumulation"),
        Unread("gradients are added in fp32, in every micro-batch"),
    ),
    Row(under(_FSDP2, "bf16"), Unread("ROLL does not read it here: FSDP2 computes in param_dtype")),
    Row(under(_FSDP2, "offload_policy"), Unread("nothing is offloaded: engines have GPUs of their own")),
    Row(
        under(_FSDP2, "apply_tiled_mlp", "tiled_num_shards", "model_type"),
        Unread("feed-forward layers are not computed in pieces, which gives the same"),
    ),
    Row(
        under(_FSDP2, "async_save_ckpt", "save_only_model", "use_batched_model_update"),
        Unread(
            "how to save is said by `checkpoint_config.async_save`, weights go out in groups as weight_bucket_mb says"
        ),
    ),
    Row(
        under("<fsdp2>.model_args", "ulysses_size"),
        Off((1,), "a sample is not split over devices: under FSDP2 every device is a data-parallel rank"),
    ),
    Row(under("<fsdp2>.model_args", "model_config_kwargs"), Off(({},), "the model is that of the checkpoint")),
    Row(under("<fsdp2>.model_args", "moe_aux_loss_coef"), Off((0,), "there is no load-balancing loss")),
    Row(
        under("<fsdp2>.model_args", "gradient_checkpointing_use_reentrant", "flash_attn", "device_map", "vision_dp"),
        Unread("how FSDP2 computes is said by its strategy_config"),
    ),
)
