"""Settings of FSDP2, the trainer of transformers' models."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Same, Step, Unread, Unsupported, under

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
    """Translate param_dtype: ROLL computes in it, or else in bf16, and ignores model_args.dtype."""
    for role, *_ in draft.expand("<fsdp2>"):
        ours, theirs = (role, "model_args", "dtype"), (role, "strategy_args", "strategy_config", "param_dtype")
        written = draft.get(theirs)
        meant = _PRECISIONS.get(written.lower()) if isinstance(written, str) else None
        if draft.is_rolls and draft.has(ours) and draft.get(ours) != (meant or "bf16"):
            draft.unread(ours)
        if written is None:
            draft.drop(theirs)
        elif meant is not None:
            draft.translate(theirs, {ours: meant}, "precision of computation; weights and gradients are fp32")
        elif written is not ABSENT:
            draft.refuse(theirs, "the trainer computes in bf16 or fp32")


def _recompute(draft: Draft, keys: Keys) -> None:
    disabled = draft.get(keys)
    if disabled is None or keys[0] != "actor_train":
        draft.unread(keys)
    elif isinstance(disabled, bool):
        target = ("actor_train", "strategy_args", "strategy_config", "recompute")
        draft.translate(keys, {target: not disabled}, "recomputation of layers in backward")


def _attention(draft: Draft, keys: Keys) -> None:
    name = draft.get(keys)
    if name in _ATTENTION:
        target = (keys[0], "strategy_args", "strategy_config", "attn_implementation")
        draft.translate(keys, {target: name}, "transformers' attention function")
    else:
        draft.unread(keys)


_ACCUMULATION = "actor_train.training_args.gradient_accumulation_steps"
_ULYSSES = "samples are not split over devices: each is a data-parallel rank"


def _ulysses(draft: Draft, keys: Keys) -> None:
    """Keep the samples of an optimizer step: devices with a shared sample in ROLL have their own here."""
    size, steps = draft.get(keys), draft.get(_ACCUMULATION)
    if size in (None, 1):
        draft.drop(keys)
    elif keys[0] != "actor_train":
        draft.unread(keys)
    elif isinstance(size, int) and isinstance(steps, int) and size > 1 and steps > 0 and steps % size == 0:
        why = f"{_ULYSSES}. With fewer micro-batches an optimizer step has the same samples; a rank needs more memory"
        draft.drop(_ACCUMULATION)
        draft.translate(keys, {_ACCUMULATION: steps // size}, why)
    else:
        draft.refuse(keys, f"{_ULYSSES}; divide gradient_accumulation_steps by ulysses_size, for the same samples")


STEPS: tuple[Step, ...] = (_precision,)

ROWS = (
    Row(under(_FSDP2, "reshard_after_forward"), Same()),
    Row(
        under(_FSDP2, "param_dtype"),
        ByStep("`<role>.model_args.dtype`, ignored by ROLL here; its default is `bf16`"),
    ),
    Row(
        under("<fsdp2>.model_args", "disable_gradient_checkpointing"),
        Custom(_recompute, "`strategy_config.recompute`, inverted; no effect for the reference"),
    ),
    Row(
        under("<fsdp2>.model_args", "attn_implementation"),
        Custom(_attention, "`strategy_config.attn_implementation` for `sdpa` and `eager`; others have no effect"),
    ),
    Row(
        under(_FSDP2, "fsdp_size ep_size efsdp_size wrap_policy apply_expert_patch moe_use_grouped_mm"),
        Unread("devices hold a part of each weight, and gather whole layers with all experts"),
    ),
    Row(
        under(_FSDP2, "reduce_dtype reduce_scatter_during_grad_accumulation"),
        Unread("gradients are accumulated in fp32, in every micro-batch"),
    ),
    Row(under(_FSDP2, "bf16"), Unread("not read by ROLL: FSDP2 computes in param_dtype")),
    Row(under(_FSDP2, "offload_policy"), Unread("no offloading: engines have their own GPUs")),
    Row(
        under(_FSDP2, "apply_tiled_mlp tiled_num_shards model_type"),
        Unread("computing in pieces gives the same"),
    ),
    Row(
        under(_FSDP2, "async_save_ckpt save_only_model use_batched_model_update"),
        Unread("see `checkpoint_config.async_save` and weight_bucket_mb"),
    ),
    Row(
        under("<fsdp2>.model_args", "ulysses_size"),
        Custom(_ulysses, "`gradient_accumulation_steps` divided by it, if it divides; no effect for the reference"),
    ),
    Row(under("<fsdp2>.model_args", "model_config_kwargs"), Unsupported(({},), "the model is the checkpoint's")),
    Row(under("<fsdp2>.model_args", "moe_aux_loss_coef"), Unsupported((0,), "there is no load-balancing loss")),
    Row(
        under("<fsdp2>.model_args", "gradient_checkpointing_use_reentrant flash_attn device_map vision_dp"),
        Unread("see strategy_config for FSDP2's settings"),
    ),
)
