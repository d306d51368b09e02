"""Megatron: layout and recomputation."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.reading.field_paths import fields_at
from roll_r3.config.tree import Keys, dotted
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Renamed, Row, Same, Step, Unread, Unsupported, under

_MEGATRON = "<trainer>.strategy_args.strategy_config"
_ADDITIONAL = "additional_configs"
_PRECISION = "the trainer computes in bf16 or fp32"
_NOT_PASSED_ON = "roll_r3 does not pass it to Megatron: write its own setting in strategy_config"


def _additional(draft: Draft) -> None:
    """Move settings out of `additional_configs`; a setting beside it takes precedence."""
    known = {key.rpartition(".")[2] for row in ROWS for key in row.keys if key.startswith(f"{_MEGATRON}.")}
    for keys in draft.expand(f"{_MEGATRON}.{_ADDITIONAL}"):
        section, settings = keys[:-1], draft.get(keys)
        if isinstance(settings, str) and settings:
            draft.refuse(keys, "settings are read from the YAML file alone: copy those of the JSON file into it")
        elif settings in (None, "") or isinstance(settings, dict):
            for name, value in list((settings or {}).items()):
                if draft.has((*section, name)):
                    draft.unread((*keys, name))
                elif name in known | set(fields_at(dotted(section), draft.data)) - {_ADDITIONAL}:
                    draft.put((*section, name), value, (*keys, name))
                else:
                    draft.refuse((*keys, name), _NOT_PASSED_ON)
            draft.drop(keys)


def _precision(draft: Draft) -> None:
    """Translate `bf16` in strategy_config: in ROLL it takes precedence over model_args.dtype."""
    for keys in draft.expand(f"{_MEGATRON}.bf16"):
        target, value = (keys[0], "model_args", "dtype"), draft.get(keys)
        if value is None:
            draft.drop(keys)
        elif isinstance(value, bool):
            meant, written = "bf16" if value else "fp32", draft.get(target)
            if meant == ("bf16" if written in (ABSENT, None) else written):
                draft.unread(keys)
                continue
            if draft.is_rolls and draft.fits(target):
                draft.drop(target)
            draft.translate(
                keys, {target: meant}, "precision of the trainer; in ROLL it takes precedence over model_args.dtype"
            )


def _layouts(draft: Draft) -> None:
    """Apply ROLL's and Megatron's own corrections of layouts and recomputation."""
    for section in draft.expand(_MEGATRON):
        if not isinstance(draft.get(section), dict):
            continue
        _moe_recompute(draft, section)
        _recompute(draft, section)
        if draft.is_rolls:
            _parallel(draft, section)


def _parallel(draft: Draft, section: Keys) -> None:
    sequence, virtual = (*section, "sequence_parallel"), (*section, "virtual_pipeline_model_parallel_size")
    tensor, experts = (draft.get((*section, f"{kind}_model_parallel_size")) for kind in ("tensor", "expert"))
    if draft.get(sequence) is True and tensor in (ABSENT, None, 1):
        draft.translate(sequence, {}, "ROLL turns it off without tensor parallelism")
    elif draft.get(sequence) is False and _above_one(tensor) and _above_one(experts):
        draft.translate(sequence, {}, "ROLL turns it on for experts under tensor parallelism")
    if draft.get(virtual) == 1:
        draft.translate(virtual, {}, "one chunk per stage is the plain schedule")


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _moe_recompute(draft: Draft, section: Keys) -> None:
    switch, modules = (*section, "moe_layer_recompute"), (*section, "recompute_modules")
    granularity = (*section, "recompute_granularity")
    if isinstance(draft.get(modules), str):
        listed = [name.strip() for name in draft.get(modules).split(",")]
        draft.translate(modules, {modules: listed}, "it is a list")
    if draft.get(switch) in (False, None):
        draft.drop(switch)
    elif draft.get(switch) is not True:
        return
    elif draft.get(granularity) == "full":
        draft.refuse(switch, "Megatron rejects it with full recompute: keep recompute_granularity: full")
    elif draft.get(granularity) in (ABSENT, None, "selective"):
        named = draft.get(modules) if isinstance(draft.get(modules), list) else ["core_attn"]
        named = named if "moe" in named else [*named, "moe"]
        why = "Megatron's selective recompute, by default with the attention core"
        draft.drop(modules)
        draft.translate(switch, {granularity: "selective", modules: named}, why)


def _recompute(draft: Draft, section: Keys) -> None:
    granularity, method, layers, modules = (
        (*section, f"recompute_{name}") for name in ("granularity", "method", "num_layers", "modules")
    )
    if draft.get(granularity) == "full" and not draft.has(method) and not draft.has(layers):
        why = "ROLL's default: every layer is recomputed separately, with the least memory"
        draft.translate(granularity, {granularity: "full", method: "uniform", layers: 1}, why)
    if draft.get(granularity) == "selective" and not draft.has(modules):
        why = "Megatron's default is the attention core"
        draft.translate(granularity, {granularity: "selective", modules: ["core_attn"]}, why)


STEPS: tuple[Step, ...] = (_additional, _precision, _layouts)

ROWS = (
    Row(
        under(
            _MEGATRON,
            "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
            "expert_model_parallel_size expert_tensor_parallel_size "
            "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
            "pipeline_model_parallel_layout use_distributed_optimizer overlap_grad_reduce "
            "moe_token_dispatcher_type moe_grouped_gemm moe_router_dtype",
        ),
        Same(),
    ),
    Row(
        under(_MEGATRON, "virtual_pipeline_model_parallel_size"),
        ByStep("the same; `1` is dropped, as the plain schedule"),
    ),
    Row(
        under(_MEGATRON, "sequence_parallel"),
        ByStep("the same; dropped, as in ROLL, if `true` without TP or `false` with TP and EP"),
    ),
    Row(
        under(_MEGATRON, "recompute_granularity recompute_method recompute_num_layers"),
        ByStep("the same; alone, `full` is every layer separately, `selective` the attention core"),
    ),
    Row(under(_MEGATRON, "recompute_modules"), ByStep("the same; text with commas becomes a list")),
    Row(
        under(_MEGATRON, "moe_layer_recompute"),
        ByStep("`recompute_granularity: selective` and `recompute_modules: [core_attn, moe]`, as Megatron reads it"),
    ),
    Row(under(_MEGATRON, "moe_aux_loss_coeff"), Same("only 0 is accepted")),
    Row(
        under("<trainer>.model_args", "moe_aux_loss_coef"),
        Renamed("<role>.strategy_args.strategy_config.moe_aux_loss_coeff", "only 0 is accepted"),
    ),
    Row(
        under(_MEGATRON, "moe_expert_capacity_factor moe_token_drop_policy"),
        Unsupported((), "no token is dropped: replay needs all of them"),
    ),
    Row(under(_MEGATRON, "moe_pad_expert_input_to_capacity"), Unsupported((False,), "experts have no capacity")),
    Row(under(_MEGATRON, "mtp_num_layers"), Unsupported((0,), "multi-token-prediction layers are not built")),
    Row(under(_MEGATRON, "fp8 fp8_format fp8_recipe"), Unsupported((), _PRECISION)),
    Row(under(_MEGATRON, "fp8_param"), Unsupported((False,), _PRECISION)),
    Row(
        under(_MEGATRON, "calculate_per_token_loss"), Unsupported((False,), "loss_agg_mode sets the loss's denominator")
    ),
    Row(under(_MEGATRON, "optimizer"), Unsupported(("adam",), "the optimizer is Adam")),
    Row(
        under(_MEGATRON, _ADDITIONAL),
        ByStep(f"its settings are treated like those beside it; others are not supported: {_NOT_PASSED_ON}"),
    ),
    Row(under(_MEGATRON, "bf16"), ByStep("`<role>.model_args.dtype`, `bf16`, or `fp32` for `false`")),
    Row(under(_MEGATRON, "fp16"), Unsupported((False,), _PRECISION)),
    Row(under(_MEGATRON, "micro_batch_size"), Unsupported((), "write training_args.per_device_train_batch_size")),
    Row(under(_MEGATRON, "moe_enable_routing_replay"), Unread("write router_replay.mode")),
    Row(
        under(_MEGATRON, "save_hf_model"),
        Unread("save_hf_steps writes weights for transformers; roll_r3.export converts a checkpoint"),
    ),
    Row(
        under(
            _MEGATRON,
            "accumulate_allreduce_grads_in_fp32 apply_rope_fusion batch_p2p_comm bias_activation_fusion "
            "bias_dropout_fusion check_for_nan_in_loss_and_grad ckpt_d2h_non_blocking ckpt_format "
            "compile_warmup cross_entropy_loss_fusion cuda_graph_impl cuda_graph_scope "
            "ddp_average_in_collective ddp_bucket_size deallocate_pipeline_outputs delay_grad_reduce "
            "distrib_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient "
            "gradient_accumulation_fusion masked_softmax_fusion moe_permute_fusion "
            "moe_shared_expert_overlap optimizer_cpu_offload optimizer_offload_fraction overlap_p2p_comm "
            "overlap_param_gather save_merged_model save_only_model sequence_packing tp_comm_overlap "
            "transformer_impl use_flash_attn variable_seq_lengths",
        ),
        Unread("about speed and saving, chosen by roll_r3; gradients are accumulated in fp32"),
    ),
)
