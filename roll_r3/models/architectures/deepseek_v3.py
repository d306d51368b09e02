"""DeepSeek-V3 and Moonlight: latent attention, dense first layers, a shared expert, and a sigmoid router with expert
bias and groups of experts.

Multi-token-prediction layers are not trained: reinforcement learning has no loss for them.
"""

from __future__ import annotations

from typing import Any

from roll_r3.models.architectures.base import (
    DENSE_MLP,
    MOE,
    NORMS,
    Architecture,
    HfConfig,
    RawConfig,
    all_layers,
    read_integer_or,
    shared_expert,
)
from roll_r3.models.architectures.hf_fields import ALL, MEGATRON, TRANSFORMERS, VLLM, Fields, Refusal, names, off, only
from roll_r3.models.architectures.rope import rope_settings


def _moe_layers(config: RawConfig) -> tuple[int, ...]:
    first = read_integer_or(config, "first_k_dense_replace", 0, least=0)
    freq = read_integer_or(config, "moe_layer_freq", 1)
    return tuple(i for i in all_layers(config) if i >= first and i % freq == 0)


def _megatron(config: HfConfig) -> dict[str, Any]:
    grouped = config.n_group > 1
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.n_shared_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_num_groups": config.n_group if grouped else None,
        "moe_router_group_topk": config.topk_group if grouped else None,
        "qk_layernorm": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        **_rope(config.rope_parameters),
    }


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return megatron's fields for `rope_parameters`, with transformers' defaults of YaRN."""
    if rope.get("rope_type", "default") == "default":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"], "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def _refuses(config: RawConfig) -> list[Refusal]:
    """Return refusals of combined settings. Missing fields have the defaults of transformers."""
    found = []
    top_k, groups = config.get("num_experts_per_tok", 8), config.get("topk_group", 4)
    if top_k == 1:
        found.append(
            Refusal(
                "num_experts_per_tok is 1: the model renormalises its sigmoid gate, megatron does not",
                MEGATRON,
            )
        )
    if config.get("n_group", 8) > 1 and top_k // groups != 2:
        reason = (
            f"num_experts_per_tok {top_k} over topk_group {groups} is not 2: the model rates a group by its two best "
            "experts, megatron by that quotient"
        )
        found.append(Refusal(reason, MEGATRON))
    if len([name for name in ("mscale", "mscale_all_dim") if rope_settings(config).get(name)]) == 1:
        found.append(
            Refusal("its rope settings have one of mscale and mscale_all_dim: transformers then scales differently")
        )
    return found


FIELDS = Fields(
    read=names(
        "n_routed_experts num_local_experts n_shared_experts moe_intermediate_size first_k_dense_replace n_group "
        "topk_group routed_scaling_factor kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
    ),
    inert={
        **dict.fromkeys(("head_dim", "qk_head_dim"), "it follows from qk_nope_head_dim and qk_rope_head_dim"),
        **dict.fromkeys(
            ("num_nextn_predict_layers", "num_mtp_layers"),
            "multi-token-prediction layers are not built; a saved checkpoint keeps their original weights",
        ),
        **dict.fromkeys(("aux_loss_alpha", "seq_aux"), "it belongs to a balancing loss, and roll_r3 has none"),
        "ep_size": "the layout of the run defines it",
    },
    only={
        "attention_bias": off(by=ALL - TRANSFORMERS),
        "norm_topk_prob": only(True, by=MEGATRON),
        "rope_interleave": only(True, by=MEGATRON | VLLM),
        "moe_layer_freq": only(1, by=TRANSFORMERS),
        "scoring_func": only("sigmoid"),
        "topk_method": only("noaux_tc"),
    },
)

_TINY = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-5,  # for latent norms too; transformers always uses 1e-6 there
    "num_nextn_predict_layers": 0,
    # SGLang reads these, transformers does not
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    moe_layers=_moe_layers,
    num_experts=("n_routed_experts", "num_local_experts"),
    megatron=_megatron,
    layer_names={
        **NORMS,
        "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",),
        "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
        "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
        "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
        "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
        "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
        "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
        **DENSE_MLP,
        **MOE,
        **shared_expert("shared_experts"),
        "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    },
    tiny={
        "deepseek_v3": {**_TINY, "rope_scaling": _YARN},
        "moonlight": {**_TINY, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    },
    router_class="DeepseekV3TopkRouter",
    gates="sigmoid",
    fields=FIELDS,
    refuses=_refuses,
    rope_types={"default": ALL, "yarn": ALL},
    latent_attention=True,
)
