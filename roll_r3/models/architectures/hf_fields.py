"""Known fields of a config.json: each is read, has no effect, or is supported with some values only.

Every architecture has one `Fields`; `COMMON` is shared by all. Unknown fields give a warning (see `Fields.unknown`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from roll_r3.config.findings.report import show_value

RawConfig = Mapping[str, Any]
"""config.json as written."""


class Builder(Enum):
    """Library that builds the model from its config.json. FSDP2 and hf_infer use transformers."""

    MEGATRON = "Megatron"
    TRANSFORMERS = "transformers"
    SGLANG = "SGLang"
    VLLM = "vLLM"


ALL = frozenset(Builder)
MEGATRON = frozenset({Builder.MEGATRON})
TRANSFORMERS = frozenset({Builder.TRANSFORMERS})
SGLANG = frozenset({Builder.SGLANG})
VLLM = frozenset({Builder.VLLM})
ENGINES = SGLANG | VLLM


@dataclass(frozen=True)
class Refusal:
    """Setting of a config.json without support in some libraries."""

    reason: str
    by: frozenset[Builder] = ALL


@dataclass(frozen=True)
class Only:
    """Supported values of a field."""

    accepts: Callable[[Any], bool]
    text: str
    """End of the sentence "it builds the model ..."."""
    by: frozenset[Builder] = ALL
    """Libraries limited to these values: they ignore any other value, or compute something else."""


def only(*values: object, by: frozenset[Builder] = ALL) -> Only:
    """Accept one of these values."""
    return Only(lambda value: value in values, f"with {' or '.join(shown(value) for value in values)} only", by)


def off(by: frozenset[Builder] = ALL) -> Only:
    """Accept null, false, 0 or an empty list: the field switches on an unsupported feature."""
    return Only(lambda value: not value, "without it", by)


@dataclass(frozen=True)
class Fields:
    """Known fields of a config.json."""

    read: frozenset[str] = frozenset()
    """Fields read to build the model or to check the run."""
    inert: Mapping[str, str] = field(default_factory=dict)
    """Field -> reason for having no effect on the computation."""
    only: Mapping[str, Only] = field(default_factory=dict)
    """Field -> supported values. A missing field has the default of transformers, one of the supported values."""

    def __or__(self, other: Fields) -> Fields:
        """Merge two accounts; `other` takes precedence."""
        return Fields(
            frozenset(name for name in self.read if name not in other) | other.read,
            {**{name: why for name, why in self.inert.items() if name not in other}, **other.inert},
            {**{name: row for name, row in self.only.items() if name not in other}, **other.only},
        )

    def __contains__(self, name: str) -> bool:
        return name in self.read or name in self.inert or name in self.only

    def unknown(self, config: RawConfig) -> list[str]:
        """Return `name = value` of each unlisted field, except transformers' own names with a leading `_`."""
        found = [name for name in config if name not in self and not name.startswith("_")]
        return [f"{name} = {shown(config[name])}" for name in found]

    def refusals(self, config: RawConfig) -> list[Refusal]:
        """Return the fields with an unsupported value."""
        return [
            Refusal(f"{name} is {shown(config[name])}, but {_names(row.by)} {row.text}", row.by)
            for name, row in self.only.items()
            if name in config and not row.accepts(config[name])
        ]


def _names(builders: Collection[Builder]) -> str:
    """Return the libraries as the subject of a sentence, with the verb."""
    found = [builder.value for builder in Builder if builder in builders]
    if len(found) == len(Builder):
        return "roll_r3 builds the model"
    if len(found) == 1:
        return f"{found[0]} builds the model"
    return f"{', '.join(found[:-1])} and {found[-1]} build the model"


def shown(value: object) -> str:
    """Return a value as shortened JSON. Text has quotation marks: a quoted number is a frequent mistake."""
    return f'"{show_value(value)}"' if isinstance(value, str) else show_value(value)


def names(text: str) -> frozenset[str]:
    """Split names at blanks."""
    return frozenset(text.split())


def _all(value: Any, text: str) -> dict[str, Any]:
    return dict.fromkeys(text.split(), value)


COMMON = Fields(
    read=names(
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps max_position_embeddings rope_parameters rope_scaling rope_theta num_experts_per_tok "
        "original_max_position_embeddings tie_word_embeddings eos_token_id quantization_config"
    ),
    inert={
        **_all("weights come from the checkpoint", "initializer_range"),
        **_all("the dtype is that of model_args.dtype and of the engine's settings", "dtype torch_dtype use_bfloat16"),
        **_all(
            "it belongs to a training loss that roll_r3 does not have, and is off in rollout and trainer",
            "attention_dropout attention_probs_dropout_prob hidden_dropout resid_pdrop embd_pdrop router_jitter_noise "
            "router_aux_loss_coef output_router_logits",
        ),
        **_all("the tokenizer and generating_args define it", "bos_token_id pad_token_id sep_token_id unk_token_id"),
        **_all(
            "a setting of generation: generating_args defines it",
            "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
            "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty "
            "epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
            "length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens "
            "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores "
            "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind "
            "temperature top_k top_p typical_p",
        ),
        **_all(
            "it changes the outputs or the storage of transformers, not the computation",
            "use_cache return_dict output_hidden_states output_attentions torchscript tie_last_hidden_states "
            "attn_implementation experts_implementation chunk_size_feed_forward pretraining_tp",
        ),
        **_all(
            "it belongs to other tasks",
            "id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix "
            "decoder_start_token_id is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
            "pruned_heads tf_legacy_loss classifier_dropout",
        ),
        **_all(
            "a note on the file",
            "architectures auto_map transformers_version name_or_path unsloth_fixed unsloth_version",
        ),
    },
    only={
        # SGLang refuses another activation at its start; vLLM and Megatron ignore the field
        "hidden_act": only("silu", by=ALL - TRANSFORMERS),
        "partial_rotary_factor": only(1.0, None),
        "is_encoder_decoder": off(),
        "per_layer_config": off(),
        # fields of other architectures; with them a checkpoint would not be a model of its model_type
        **_all(
            off(),
            "attention_bias mlp_bias attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling "
            "attention_multiplier residual_multiplier embedding_multiplier query_pre_attn_scalar attention_chunk_size "
            "sliding_window use_sliding_window clip_qkv swiglu_limit no_rope_layers text_config",
        ),
        "layer_types": Only(
            lambda value: value is None or (isinstance(value, list) and set(value) <= {"full_attention"}),
            'with "full_attention" in every layer',
        ),
    },
)
"""Fields with one meaning in all architectures."""
