"""Whether the configuration fits the model: what only its config.json can tell."""

from __future__ import annotations

from dataclasses import replace

from roll_r3.config.derived import (
    checkpoint_of,
    engine_size,
    expert_layout,
    layout,
    longest_sequence,
    megatron_workers,
    runs_megatron,
    workers,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import ENGINE, EP, MEGATRON, PP, TP, TRAIN, TRAIN_REPLAY, VPP
from roll_r3.config.rules.table import Verdict, remainder
from roll_r3.models.layer_map import chunk_layers
from roll_r3.preflight.checkpoints import Model
from roll_r3.preflight.rules.table import AnyPreflightRule, ModelRule, RoleModel, SurroundingsRule
from roll_r3.preflight.surroundings import Surroundings

_CHECKPOINTS = ("pretrain", "*.model_args.model_name_or_path")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _models(config: RLVRConfig, surroundings: Surroundings) -> dict[str, Model]:
    """Role -> its model, where that is known."""
    names = {role: checkpoint_of(config, role) for role in workers(config)}
    return {role: surroundings.models[name] for role, name in names.items() if name in surroundings.models}


def _is_dense(model: Model) -> bool:
    return not model.facts.moe_layers if model.facts else not any(name in model.raw for name in _EXPERTS)


def _replays_dense(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_train")
    if config.actor_train.router_replay.mode == "disable" or model is None or not _is_dense(model):
        return False
    return f"model_type {model.raw.get('model_type')}, as {model.source} says"


def _unknown_architectures(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    reasons = [f"{role}: {m.reason}" for role, m in _models(config, surroundings).items() if m.facts is None]
    return "; ".join(reasons)


def _quantized(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    found = [
        f"{role}: {quantization.get('quant_method', 'quantized') if isinstance(quantization, dict) else quantization}"
        for role, model in _models(config, surroundings).items()
        if (quantization := model.raw.get("quantization_config"))
    ]
    return ", ".join(found)


def _engine_runs_another_model(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = _models(config, surroundings)
    shapes = [
        replace(m.facts, context_length=0) for r in ("actor_train", "actor_infer") if (m := models.get(r)) and m.facts
    ]
    return len(set(shapes)) == 2


def _reference_speaks_otherwise(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    models = _models(config, surroundings)
    sizes = [m.facts.vocab_size for r in ("actor_train", "reference") if (m := models.get(r)) and m.facts]
    return f"{sizes[0]} and {sizes[1]} tokens" if len(set(sizes)) == 2 else False


def _engine_splits_heads(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    model = _models(config, surroundings).get("actor_infer")
    if model is None or model.facts is None:
        return False
    return remainder(model.facts.num_attention_heads, engine_size(config), "ranks")


def _splits_heads(model: RoleModel) -> Verdict:
    return remainder(model.facts.num_attention_heads, layout(model.worker).tensor_model_parallel_size, "ranks")


def _splits_key_value_heads(model: RoleModel) -> Verdict:
    tp, heads = layout(model.worker).tensor_model_parallel_size, model.facts.num_key_value_heads
    uneven = heads % tp and tp % heads and not model.facts.latent_attention
    return f"{heads} heads, TP {tp}" if uneven else False


def _layers_over_stages(model: RoleModel) -> Verdict:
    try:
        chunk_layers(model.facts.num_layers, layout(model.worker))
    except ValueError as error:
        return str(error)
    return False


def _too_long(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    longest = longest_sequence(config)
    short = [
        f"{role}'s was made for {m.facts.context_length}"
        for role, m in _models(config, surroundings).items()
        if m.facts and longest > m.facts.context_length
    ]
    return f"{longest} tokens; {', '.join(short)}" if short else False


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
        fields=(TRAIN_REPLAY, *_CHECKPOINTS),
        why="the model has no MoE layer, so there is no routing to replay",
        fix="write router_replay.mode: disable on both sides, or name an MoE checkpoint",
        wrong=("pretrain=Qwen/Qwen3-8B",),
        right=("pretrain=allenai/OLMoE-1B-7B-0924", "prompt_length=512"),
        violates=_replays_dense,
    ),
    SurroundingsRule(
        id="architecture-known",
        fields=_CHECKPOINTS,
        why="roll_r3 cannot train this architecture",
        fix="name a checkpoint of one of them",
        wrong=("pretrain=Qwen/Qwen3-8B",),
        right=("pretrain=mistralai/Mixtral-8x7B-v0.1",),
        violates=_unknown_architectures,
    ),
    SurroundingsRule(
        id="checkpoint-not-quantized",
        fields=_CHECKPOINTS,
        why="training starts from unquantized weights, and weight updates would not fit a quantized engine",
        fix="name a bf16 copy of the checkpoint",
        wrong=("pretrain=deepseek-ai/DeepSeek-V3",),
        right=("pretrain=unsloth/DeepSeek-V3-bf16",),
        violates=_quantized,
    ),
    SurroundingsRule(
        id="engine-runs-the-same-model",
        fields=("actor_infer.model_args.model_name_or_path", "actor_train.model_args.model_name_or_path", "pretrain"),
        why="the engine takes over the trainer's weights, so both must be the same model",
        fix="leave model_name_or_path out for both",
        wrong=("actor_infer.model_args.model_name_or_path=allenai/OLMoE-1B-7B-0924",),
        right=("actor_infer.model_args.model_name_or_path=Qwen/Qwen3-30B-A3B-Base",),
        violates=_engine_runs_another_model,
    ),
    SurroundingsRule(
        id="reference-speaks-the-same-tokens",
        fields=("reference.model_args.model_name_or_path", "actor_train.model_args.model_name_or_path", "pretrain"),
        why="the KL term compares probabilities of the same tokens, and these models have different vocabularies",
        fix="name a reference of the same family",
        wrong=("use_kl_loss=true", "reference.model_args.model_name_or_path=allenai/OLMoE-1B-7B-0924"),
        right=("use_kl_loss=true", "reference.model_args.model_name_or_path=Qwen/Qwen3-30B-A3B-Base"),
        violates=_reference_speaks_otherwise,
    ),
    SurroundingsRule(
        id="context-holds-the-longest",
        fields=("response_length", "prompt_length", *_CHECKPOINTS),
        why="prompt_length + response_length is longer than the sequences that the model was made for",
        fix="make one of them shorter",
        wrong=("response_length=50000",),
        right=("response_length=30000",),
        violates=_too_long,
    ),
    ModelRule(
        id="experts-over-expert-parallel",
        fields=(EP,),
        why="every expert-parallel rank holds as many experts",
        fix="write a size that divides the model's experts",
        wrong=("actor_train.device_mapping=range(3)", f"{TRAIN}.expert_model_parallel_size=3", "rollout_batch_size=3"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.expert_model_parallel_size=4"),
        violates=lambda model: remainder(model.facts.num_experts, expert_layout(model.worker)[1], "ranks"),
    ),
    ModelRule(
        id="heads-over-tensor-parallel",
        fields=(TP,),
        why="every tensor-parallel rank holds as many attention heads",
        fix="write a size that divides the model's attention heads",
        wrong=("actor_train.device_mapping=range(3)", f"{TRAIN}.tensor_model_parallel_size=3"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.tensor_model_parallel_size=4"),
        violates=_splits_heads,
    ),
    ModelRule(
        id="key-value-heads-over-tensor-parallel",
        fields=(TP,),
        why="key and value heads are split over the tensor-parallel ranks, or each is shared by as many of them",
        fix="write a size that divides the key and value heads, or a multiple of their number",
        wrong=(
            "actor_train.device_mapping=range(6)",
            f"{TRAIN}.tensor_model_parallel_size=6",
            "rollout_batch_size=6",
        ),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.tensor_model_parallel_size=4"),
        violates=_splits_key_value_heads,
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
        why="the model's layers cannot be shared out to the pipeline like this",
        fix="choose other sizes, or write pipeline_model_parallel_layout",
        wrong=("actor_train.device_mapping=range(5)", f"{TRAIN}.pipeline_model_parallel_size=5"),
        right=("actor_train.device_mapping=range(4)", f"{TRAIN}.pipeline_model_parallel_size=4"),
        violates=_layers_over_stages,
    ),
    SurroundingsRule(
        id="tied-embeddings-need-one-stage",
        fields=(f"*.{PP}", *_CHECKPOINTS),
        why="the model ties its output to its embedding, and such weights are not loaded onto pipeline stages",
        fix="write pipeline_model_parallel_size: 1",
        wrong=(
            "pretrain=Qwen/Qwen3-4B",
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        right=("actor_train.device_mapping=range(2)", f"{TRAIN}.pipeline_model_parallel_size=2"),
        violates=_tied_over_stages,
    ),
    SurroundingsRule(
        id="bias-to-move",
        fields=(f"{TRAIN}.moe_router_bias_update_rate", *_CHECKPOINTS),
        why="the model has no expert bias that an optimizer step could move",
        fix="leave moe_router_bias_update_rate out",
        wrong=(f"{TRAIN}.moe_router_bias_update_rate=0.001",),
        right=("pretrain=moonshotai/Moonlight-16B-A3B", f"{TRAIN}.moe_router_bias_update_rate=0.001"),
        violates=_no_bias_to_move,
    ),
    SurroundingsRule(
        id="engine-heads-over-tp",
        fields=(f"{ENGINE}.tp_size", "actor_infer.model_args.model_name_or_path", "pretrain"),
        why="every tensor-parallel rank of the engine holds as many attention heads",
        fix="write a tp_size that divides the model's attention heads",
        wrong=("actor_infer.device_mapping=range(3)", f"{ENGINE}.tp_size=3"),
        right=("actor_infer.device_mapping=range(4)", f"{ENGINE}.tp_size=4"),
        violates=_engine_splits_heads,
    ),
)
