"""Rules about the model's config.json and the layout."""

from __future__ import annotations

from dataclasses import replace

from roll_r3.config.derived import (
    checkpoint_of,
    engine_room,
    engine_size,
    expert_layout,
    layout,
    longest_sequence,
    megatron_workers,
    runs_megatron,
    sglang,
    vllm,
    workers,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.layout import SPLIT_RULES
from roll_r3.config.rules.paths import ENGINE, EP, ETP, MEGATRON, PP, TP, TRAIN, TRAIN_REPLAY, VPP
from roll_r3.config.rules.table import Verdict, remainder
from roll_r3.engines.vllm.server import cpu_lacks_a_kernel
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.families import untrainable, untrainable_by_name
from roll_r3.models.layer_map import chunk_layers
from roll_r3.models.size import shape_of, shape_problem, width_problems
from roll_r3.preflight.model_files import Model
from roll_r3.preflight.rules.surroundings_rule import (
    CHECKPOINTS,
    VLLM_INSTALLED,
    AnyPreflightRule,
    ModelRule,
    Pretend,
    RoleModel,
    SurroundingsRule,
)
from roll_r3.preflight.surroundings import Surroundings


def _models(config: RLVRConfig, surroundings: Surroundings) -> dict[str, Model]:
    """Return role -> model, for known models."""
    names = {role: checkpoint_of(config, role) for role in workers(config)}
    return {role: surroundings.models[name] for role, name in names.items() if name in surroundings.models}


def _stop_tokens_outside(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_infer")
    if model is None or model.facts is None:
        return False
    outside = [i for i in config.actor_infer.generating_args.stop_token_ids if i >= model.facts.vocab_size]
    return f"vocab_size is {model.facts.vocab_size}, got {outside}" if outside else False


def _replays_without_routers(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_train")
    if config.actor_train.router_replay.mode == "disable" or model is None or model.facts is None:
        return False
    return "" if model.facts.moe_layers else f"according to {model.source}"


def _untrained_architectures(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    reasons = {
        checkpoint_of(config, role): untrainable(model.raw) or model.reason
        for role, model in _models(config, surroundings).items()
        if model.facts is None
    }
    for name in surroundings.unknown_models(config):
        if (guess := untrainable_by_name(name)) and guess.certain:
            reasons[name] = guess.reason
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _quantized(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    found = [
        f"{role}: {quantization.get('quant_method', 'quantized') if isinstance(quantization, dict) else quantization}"
        for role, model in _models(config, surroundings).items()
        if (quantization := model.raw.get("quantization_config"))
    ]
    return ", ".join(found)


def _recomputes_missing_module(model: RoleModel) -> Verdict:
    settings = layout(model.worker)
    recomputed = settings.recompute_granularity == "selective" and "mla_up_proj" in settings.recompute_modules
    return recomputed and not model.facts.latent_attention


def _engine_runs_another_model(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = _models(config, surroundings)
    shapes = [
        replace(m.facts, context_length=0) for r in ("actor_train", "actor_infer") if (m := models.get(r)) and m.facts
    ]
    return len(set(shapes)) == 2


def _reference_has_another_vocabulary(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = _models(config, surroundings)
    sizes = [m.facts.vocab_size for r in ("actor_train", "reference") if (m := models.get(r)) and m.facts]
    return f"{sizes[0]} and {sizes[1]} tokens" if len(set(sizes)) == 2 else False


def _engine_lacks_a_kernel(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_infer")
    serves = config.device_type == "cpu" and sglang(config) is not None
    return serves and model is not None and model.raw.get("model_type") == "qwen2_moe"


def _vllm_lacks_a_kernel(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_infer")
    if config.device_type != "cpu" or vllm(config) is None or model is None or model.facts is None:
        return False
    return "" if shape_problem(model.raw) else cpu_lacks_a_kernel(shape_of(model.raw))


def _engine_splits_heads(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_infer")
    if model is None or model.facts is None:
        return False
    return remainder(model.facts.num_attention_heads, engine_size(config), "ranks")


def _unreadable_sizes(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = {role: model for role, model in _models(config, surroundings).items() if model.facts}
    found = {shape_problem(model.raw) for role, model in models.items() if role in megatron_workers(config)}
    return "; ".join(sorted(found - {""}))


def _uneven_widths(model: RoleModel) -> Verdict:
    return False if shape_problem(model.raw) else "; ".join(width_problems(model.raw, model.worker))


def _layers_over_stages(model: RoleModel) -> Verdict:
    if any(rule.violates(model.worker) for rule in SPLIT_RULES):
        return False  # reported by a rule of its own
    try:
        chunk_layers(model.facts.num_layers, layout(model.worker))
    except ValueError as error:
        return str(error)
    return False


def _too_long(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    short = []
    for role, model in _models(config, surroundings).items():
        needed = engine_room(config) if role == "actor_infer" else longest_sequence(config)
        if model.facts and needed > model.facts.context_length:
            short.append(f"{role} needs {needed} tokens, its model supports {model.facts.context_length}")
    return "; ".join(short)


def _tied_over_stages(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = _models(config, surroundings)
    stages = {role: layout(w).pipeline_model_parallel_size for role, w in megatron_workers(config).items()}
    return ", ".join(
        role
        for role, number in stages.items()
        if number > 1 and role in models and models[role].raw.get("tie_word_embeddings")
    )


def _no_bias_to_move(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_train")
    moves = runs_megatron(config.actor_train) and layout(config.actor_train).moe_router_bias_update_rate != 0
    return moves and model is not None and model.facts is not None and not model.facts.expert_bias


RULES: tuple[AnyPreflightRule, ...] = (
    SurroundingsRule(
        id="dense-model-with-replay",
        fields=(TRAIN_REPLAY, *CHECKPOINTS),
        why="this model has no MoE layer, so there is no routing to replay",
        fix="use a checkpoint with MoE layers, or disable replay on both sides",
        wrong=(),
        wrong_where=Pretend(config_json={"mlp_only_layers": list(range(48))}),
        right=("pretrain=allenai/OLMoE-1B-7B-0924", "prompt_length=512"),
        violates=_replays_without_routers,
    ),
    SurroundingsRule(
        id="architecture-known",
        fields=CHECKPOINTS,
        why="roll_r3 cannot train this architecture",
        fix=f"use a checkpoint of {', '.join(sorted(ARCHITECTURES))}",
        wrong=("pretrain=Qwen/Qwen3-8B",),
        right=("pretrain=mistralai/Mixtral-8x7B-v0.1",),
        violates=_untrained_architectures,
    ),
    SurroundingsRule(
        id="checkpoint-not-quantized",
        fields=CHECKPOINTS,
        why="training needs unquantized weights, and a quantized engine cannot take weight updates",
        fix="use a bf16 copy of the checkpoint",
        wrong=("pretrain=deepseek-ai/DeepSeek-V3",),
        right=("pretrain=unsloth/DeepSeek-V3-bf16",),
        violates=_quantized,
    ),
    SurroundingsRule(
        id="engine-runs-the-same-model",
        fields=("actor_infer.model_args.model_name_or_path", "actor_train.model_args.model_name_or_path", "pretrain"),
        why="the engine receives the trainer's weights, so both must be the same model",
        fix="remove model_name_or_path from both",
        wrong=("actor_infer.model_args.model_name_or_path=allenai/OLMoE-1B-7B-0924",),
        right=("actor_infer.model_args.model_name_or_path=Qwen/Qwen3-30B-A3B-Base",),
        violates=_engine_runs_another_model,
    ),
    SurroundingsRule(
        id="reference-speaks-the-same-tokens",
        fields=("reference.model_args.model_name_or_path", "actor_train.model_args.model_name_or_path", "pretrain"),
        why="the KL term compares probabilities of the same tokens, and these models have different vocabularies",
        fix="use a reference of the same model family",
        wrong=("use_kl_loss=true", "reference.model_args.model_name_or_path=allenai/OLMoE-1B-7B-0924"),
        right=("use_kl_loss=true", "reference.model_args.model_name_or_path=Qwen/Qwen3-30B-A3B-Base"),
        violates=_reference_has_another_vocabulary,
    ),
    SurroundingsRule(
        id="context-holds-the-longest",
        fields=("response_length", "prompt_length", "validation.generating_args.max_new_tokens", *CHECKPOINTS),
        depends=("actor_infer.generating_args.max_new_tokens",),
        why="prompt_length and the longest response, plus a few tokens reserved by the engine, are longer than the "
        "model's context",
        fix="write a smaller prompt_length, response_length or max_new_tokens of validation",
        wrong=("response_length=50000",),
        right=("response_length=30000",),
        violates=_too_long,
    ),
    ModelRule(
        id="experts-over-expert-parallel",
        fields=(EP,),
        why="every expert-parallel rank must hold the same number of experts",
        fix="write a size that divides the number of experts",
        wrong=("actor_train.device_mapping=range(3)", f"{TRAIN}.expert_model_parallel_size=3", "rollout_batch_size=3"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.expert_model_parallel_size=4"),
        violates=lambda model: remainder(model.facts.num_experts, expert_layout(model.worker)[1], "ranks"),
    ),
    ModelRule(
        id="widths-over-tensor-parallel",
        fields=(TP, ETP),
        why="every rank must hold the same number of attention heads, and an equal part of every width of the model",
        fix="write sizes that divide them",
        wrong=("actor_train.device_mapping=range(3)", f"{TRAIN}.tensor_model_parallel_size=3"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.tensor_model_parallel_size=4"),
        violates=_uneven_widths,
    ),
    SurroundingsRule(
        id="sizes-readable",
        fields=CHECKPOINTS,
        why="the sizes of the model cannot be read from its config.json, so they were not checked against the layout",
        fix="write them into config.json",
        wrong=(),
        wrong_where=Pretend(config_json={"hidden_size": None}),
        right=(),
        violates=_unreadable_sizes,
        severity="warning",
    ),
    ModelRule(
        id="layers-over-stages",
        fields=(
            PP,
            VPP,
            f"{MEGATRON}.num_layers_in_first_pipeline_stage",
            f"{MEGATRON}.num_layers_in_last_pipeline_stage",
            f"{MEGATRON}.pipeline_model_parallel_layout",
        ),
        depends=tuple(f"{MEGATRON}.account_for_{what}_in_pipeline_split" for what in ("embedding", "loss")),
        why="the model's layers do not divide over the pipeline like this",
        fix="choose other sizes, or write pipeline_model_parallel_layout",
        wrong=("actor_train.device_mapping=range(5)", f"{TRAIN}.pipeline_model_parallel_size=5"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.pipeline_model_parallel_size=4"),
        violates=_layers_over_stages,
    ),
    SurroundingsRule(
        id="tied-embeddings-need-one-stage",
        fields=(f"*.{PP}", *CHECKPOINTS),
        why="the model's output layer is its embedding, and tied weights cannot be loaded onto several pipeline stages",
        fix="write pipeline_model_parallel_size: 1",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        right=("actor_train.device_mapping=range(2)", f"{TRAIN}.pipeline_model_parallel_size=2"),
        wrong_where=Pretend(config_json={"tie_word_embeddings": True}),
        violates=_tied_over_stages,
    ),
    ModelRule(
        id="latent-attention-to-recompute",
        fields=(f"{MEGATRON}.recompute_modules", f"{MEGATRON}.recompute_granularity"),
        why="mla_up_proj is a part of latent attention, and this model has none",
        fix="remove mla_up_proj",
        wrong=(f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[mla_up_proj]"),
        right=(
            "pretrain=moonshotai/Moonlight-16B-A3B",
            f"{TRAIN}.recompute_granularity=selective",
            f"{TRAIN}.recompute_modules=[mla_up_proj]",
        ),
        violates=_recomputes_missing_module,
    ),
    SurroundingsRule(
        id="bias-to-move",
        fields=(f"{TRAIN}.moe_router_bias_update_rate", *CHECKPOINTS),
        why="the model has no expert bias to update",
        fix="remove moe_router_bias_update_rate",
        wrong=(f"{TRAIN}.moe_router_bias_update_rate=0.001",),
        right=("pretrain=moonshotai/Moonlight-16B-A3B", f"{TRAIN}.moe_router_bias_update_rate=0.001"),
        violates=_no_bias_to_move,
    ),
    SurroundingsRule(
        id="engine-serves-the-model",
        fields=(
            "device_type",
            "actor_infer.strategy_args.strategy_name",
            "actor_infer.model_args.model_name_or_path",
            "pretrain",
        ),
        why="on a CPU SGLang cannot run Qwen2-MoE: the gate of its shared expert is a Triton kernel",
        fix="sample on a GPU, write strategy_name: hf_infer, or use another model",
        wrong=("device_type=cpu", "pretrain=Qwen/Qwen2-57B-A14B"),
        right=("device_type=cuda", "pretrain=Qwen/Qwen2-57B-A14B", "actor_infer.device_mapping=1"),
        violates=_engine_lacks_a_kernel,
    ),
    SurroundingsRule(
        id="vllm-serves-the-model",
        fields=(
            "device_type",
            "actor_infer.strategy_args.strategy_name",
            "actor_infer.model_args.model_name_or_path",
            "pretrain",
        ),
        why="on a CPU vLLM cannot run this model",
        fix="sample on a GPU, write strategy_name: sglang or hf_infer, or use another model (for a tiny "
        "model, make one with --head-dim 32)",
        wrong=(
            "device_type=cpu",
            "pretrain=moonshotai/Moonlight-16B-A3B",
            "actor_infer.strategy_args={strategy_name: vllm}",
        ),
        right=("device_type=cpu", "actor_infer.strategy_args={strategy_name: vllm}"),
        right_where=VLLM_INSTALLED,
        violates=_vllm_lacks_a_kernel,
    ),
    SurroundingsRule(
        id="stop-tokens-in-the-vocabulary",
        fields=("actor_infer.generating_args.stop_token_ids", *CHECKPOINTS),
        why="the model has no such token, so it would never end a response",
        fix="write ids below the model's vocab_size",
        wrong=("actor_infer.generating_args.stop_token_ids=[10000000]",),
        right=("actor_infer.generating_args.stop_token_ids=[100]",),
        violates=_stop_tokens_outside,
    ),
    SurroundingsRule(
        id="engine-heads-over-tp",
        fields=(f"{ENGINE}.tp_size", "actor_infer.model_args.model_name_or_path", "pretrain"),
        why="every tensor-parallel rank of the engine must hold the same number of attention heads",
        fix="write a tp_size that divides the number of attention heads",
        wrong=("actor_infer.device_mapping=range(3)", f"{ENGINE}.tp_size=3"),
        right=("actor_infer.device_mapping=range(4)", f"{ENGINE}.tp_size=4"),
        violates=_engine_splits_heads,
    ),
)
