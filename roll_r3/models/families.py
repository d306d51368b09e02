"""Model families not trained by roll_r3, recognised by config.json or by name, each with the reason.

An architecture in `ARCHITECTURES` is trained in spite of its row here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import RawConfig

Kind = Literal["dense", "wrapper", "moe"]
_REASONS: dict[Kind, str] = {
    "dense": "is dense: it has no MoE layer, so there is no routing to replay, and only MoE models are trained",
    "wrapper": "puts a text model behind a vision or audio encoder, and only text models are trained",
    "moe": "is an MoE family that is not supported yet",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
"""Fields of an MoE's config.json; a dense model has none of them."""
_INNER = ("text_config", "language_config", "llm_config", "thinker_config")
"""Sections of a wrapper's config.json for its text model."""

FAMILIES: dict[str, tuple[Kind, str]] = {
    "gemma2": ("dense", "Gemma 2"),
    "gemma3_text": ("dense", "Gemma 3"),
    "llama": ("dense", "Llama"),
    "mistral": ("dense", "Mistral"),
    "olmo2": ("dense", "OLMo 2"),
    "olmo3": ("dense", "OLMo 3"),
    "phi3": ("dense", "Phi-3"),
    "qwen2": ("dense", "Qwen2"),
    "qwen3": ("dense", "Qwen3"),
    "smollm3": ("dense", "SmolLM3"),
    "gemma3": ("wrapper", "Gemma 3"),
    "ernie4_5_moe_vl": ("wrapper", "ERNIE 4.5 VL"),
    "glm4v_moe": ("wrapper", "GLM-4.5V"),
    "kimi_k25": ("wrapper", "Kimi K2.5"),
    "kimi_vl": ("wrapper", "Kimi-VL"),
    "llama4": ("wrapper", "Llama 4"),
    "mllama": ("wrapper", "Llama 3.2 Vision"),
    "qwen2_5_omni": ("wrapper", "Qwen2.5-Omni"),
    "qwen2_5_vl": ("wrapper", "Qwen2.5-VL"),
    "qwen2_audio": ("wrapper", "Qwen2-Audio"),
    "qwen2_vl": ("wrapper", "Qwen2-VL"),
    "qwen3_5": ("wrapper", "Qwen3.5"),
    "qwen3_5_moe": ("wrapper", "Qwen3.5-MoE"),
    "qwen3_omni_moe": ("wrapper", "Qwen3-Omni"),
    "qwen3_vl": ("wrapper", "Qwen3-VL"),
    "qwen3_vl_moe": ("wrapper", "Qwen3-VL-MoE"),
    "step3p7": ("wrapper", "Step-3.7"),
    "deepseek": ("moe", "DeepSeekMoE"),
    "deepseek_v2": ("moe", "DeepSeek-V2"),
    "deepseek_v32": ("moe", "DeepSeek-V3.2"),
    "deepseek_v4": ("moe", "DeepSeek-V4"),
    "dots1": ("moe", "dots.llm1"),
    "ernie4_5_moe": ("moe", "ERNIE 4.5"),
    "flex_olmo": ("moe", "FlexOlmo"),
    "glm4_moe": ("moe", "GLM-4.5 to 4.7"),
    "glm4_moe_lite": ("moe", "GLM-4.7-Flash"),
    "glm_moe_dsa": ("moe", "GLM-5"),
    "gpt_oss": ("moe", "gpt-oss"),
    "granitemoe": ("moe", "Granite-MoE"),
    "hunyuan_v1_moe": ("moe", "Hunyuan-A13B"),
    "jamba": ("moe", "Jamba"),
    "kimi_k2": ("moe", "Kimi K2"),
    "kimi_linear": ("moe", "Kimi-Linear"),
    "llama4_text": ("moe", "Llama 4"),
    "minimax": ("moe", "MiniMax-Text-01 and M1"),
    "minimax_m2": ("moe", "MiniMax-M2"),
    "phimoe": ("moe", "Phi-MoE"),
    "qwen3_5_moe_text": ("moe", "Qwen3.5-MoE"),
    "qwen3_next": ("moe", "Qwen3-Next"),
}
"""`model_type` -> (its kind, what its publisher calls it)."""

_SIZE = r"\d+(\.\d+)?B"
_DENSE_SIZE = rf"{_SIZE}(?!-A\d)"
_NAMES: tuple[tuple[str, str, str], ...] = (
    ("Qwen", rf"QwQ-{_SIZE}", "qwen2"),
    ("Qwen", rf"Qwen(1\.5|2|2\.5)-(Coder-|Math-)?{_DENSE_SIZE}", "qwen2"),
    ("Qwen", rf"Qwen3-{_DENSE_SIZE}", "qwen3"),
    ("Qwen", r"Qwen3-(Coder-)?Next\b", "qwen3_next"),
    ("Qwen", rf"Qwen3\.5-{_SIZE}-A\d", "qwen3_5_moe"),
    ("Qwen", rf"Qwen3\.5-{_DENSE_SIZE}", "qwen3_5"),
    ("Qwen", r"Qwen2-VL\b", "qwen2_vl"),
    ("Qwen", r"Qwen2\.5-VL\b", "qwen2_5_vl"),
    ("Qwen", rf"Qwen3-VL-{_SIZE}-A\d", "qwen3_vl_moe"),
    ("Qwen", rf"Qwen3-VL-{_DENSE_SIZE}", "qwen3_vl"),
    ("Qwen", r"Qwen2\.5-Omni\b", "qwen2_5_omni"),
    ("Qwen", r"Qwen3-Omni\b", "qwen3_omni_moe"),
    ("Qwen", r"Qwen2-Audio\b", "qwen2_audio"),
    ("deepseek-ai", r"DeepSeek-R1-Distill-Qwen\b", "qwen2"),
    ("deepseek-ai", r"DeepSeek-R1-Distill-Llama\b", "llama"),
    ("deepseek-ai", r"DeepSeek-R1-0528-Qwen3-8B", "qwen3"),
    ("deepseek-ai", r"deepseek-moe-16b", "deepseek"),
    ("deepseek-ai", r"DeepSeek-(Coder-)?V2\b", "deepseek_v2"),
    ("deepseek-ai", r"DeepSeek-V3\.2\b", "deepseek_v32"),
    ("deepseek-ai", r"DeepSeek-V4\b", "deepseek_v4"),
    ("zai-org", r"GLM-4\.[56]V\b", "glm4v_moe"),
    ("zai-org", r"GLM-4\.7-Flash\b", "glm4_moe_lite"),
    ("zai-org", r"GLM-4\.[567](?!V)", "glm4_moe"),
    ("zai-org", r"GLM-5\b", "glm_moe_dsa"),
    ("openai", r"gpt-oss\b", "gpt_oss"),
    ("meta-llama", r"Llama-4\b", "llama4"),
    ("meta-llama", rf"Llama-3\.2-{_SIZE}-Vision", "mllama"),
    ("meta-llama", rf"(Meta-)?Llama-(2|3|3\.1|3\.2|3\.3)-{_SIZE}(?!-Vision)", "llama"),
    ("mistralai", r"Mistral-7B\b", "mistral"),
    ("google", r"gemma-2-\d", "gemma2"),
    ("google", r"gemma-3-(1b|270m)\b", "gemma3_text"),
    ("google", r"gemma-3-(4b|12b|27b)\b", "gemma3"),
    ("moonshotai", r"Kimi-K2\.5\b", "kimi_k25"),
    ("moonshotai", r"Kimi-K2(?!\.)", "kimi_k2"),
    ("moonshotai", r"Kimi-Linear\b", "kimi_linear"),
    ("moonshotai", r"Kimi-VL\b", "kimi_vl"),
    ("MiniMaxAI", r"MiniMax-M2\b", "minimax_m2"),
    ("MiniMaxAI", r"MiniMax-(Text-01|M1)\b", "minimax"),
    ("microsoft", r"Phi-3\.5-MoE\b", "phimoe"),
    ("tencent", r"Hunyuan-A13B\b", "hunyuan_v1_moe"),
    ("baidu", rf"ERNIE-4\.5-VL-{_SIZE}-A\d", "ernie4_5_moe_vl"),
    ("baidu", rf"ERNIE-4\.5-{_SIZE}-A\d", "ernie4_5_moe"),
    ("rednote-hilab", r"dots\.llm1\b", "dots1"),
    ("allenai", r"FlexOlmo\b", "flex_olmo"),
    ("allenai", r"OLMo-2-\d", "olmo2"),
    ("HuggingFaceTB", r"SmolLM3\b", "smollm3"),
)
"""(owner on the hub, pattern at the start of the model's name, `model_type`)."""


@dataclass(frozen=True)
class Guess:
    """Model recognised by its name alone."""

    reason: str
    """Reason for not training it."""
    certain: bool
    """True for the publisher's own name; False for a similar name of another owner."""


def untrainable(config: RawConfig) -> str:
    """Return why roll_r3 does not train the model of this config.json; empty for a known architecture."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return "config.json has no model_type"
    if model_type in ARCHITECTURES:
        return ""
    if model_type in FAMILIES:
        kind, label = FAMILIES[model_type]
        return f"model_type {model_type!r}: {label} {_REASONS[kind]}"
    kind_by_fields = _kind(config)
    if kind_by_fields is None:
        return f"model_type {model_type!r} is not known"
    return f"model_type {model_type!r}: it {_REASONS[kind_by_fields]}"


def untrainable_by_name(name: str) -> Guess | None:
    """Guess from the name of a checkpoint, on the hub or of a directory; None if it may be trainable."""
    owner, _, model = name.rstrip("/").rpartition("/")
    for publisher, pattern, model_type in _NAMES:
        if model_type not in ARCHITECTURES and re.match(pattern, model, re.IGNORECASE):
            kind, label = FAMILIES[model_type]
            return Guess(f"{label} {_REASONS[kind]}", certain=owner.lower() == publisher.lower())
    return None


def _kind(config: RawConfig) -> Kind | None:
    if any(isinstance(config.get(name), dict) for name in _INNER):
        return "wrapper"
    if any(config.get(name) for name in _EXPERTS):
        return "moe"
    return "dense" if "num_hidden_layers" in config and "hidden_size" in config else None
