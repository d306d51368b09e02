"""Parameter counts by arithmetic, against transformers' own modules (on the meta device) and published figures."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from roll_r3.config.workers import ActorTrainConfig
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import MAX_SIZE, TINY
from roll_r3.models.known import known_config, known_configs
from roll_r3.models.size import _SIZES, Split, held_parameters, model_size, shape_problem, width_problems

PUBLISHED = {
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-235B-A22B": (235, 22),
    "Qwen/Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "Qwen/Qwen2-57B-A14B": (57.4, 14),
    "allenai/OLMoE-1B-7B-0924": (6.9, 1.3),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "mistralai/Mixtral-8x22B-v0.1": (141, 39),
    "deepseek-ai/DeepSeek-V3": (671, 37),
    "moonshotai/Moonlight-16B-A3B": (16, 3),
}
"""Billions of parameters, and of active parameters, as rounded by the publishers."""


def tiny_configs() -> dict[str, dict]:
    """Return config.json of each tiny model, as written by transformers."""
    from transformers import AutoConfig

    return {
        name: json.loads(AutoConfig.for_model(a.model_type, **{**TINY, "vocab_size": 260, **fields}).to_json_string())
        for a in ARCHITECTURES.values()
        for name, fields in a.tiny.items()
    }


def parameters_of_transformers(config: dict) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(n for n, c in known_configs().items() if c["model_type"] in ARCHITECTURES))
def test_known_models_are_as_large_as_transformers_makes_them(name):
    config = known_configs()[name]
    assert model_size(config).total == parameters_of_transformers(dict(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for a in ARCHITECTURES.values() for name in a.tiny])
def test_tiny_models_are_as_large_as_transformers_makes_them(name, tied):
    config = tiny_configs()[name] | {"tie_word_embeddings": tied}
    assert model_size(config).total == parameters_of_transformers(config)


def test_missing_biases_are_not_counted():
    config = tiny_configs()["qwen2_moe"]
    without = config | {"qkv_bias": False}
    assert model_size(without).total == parameters_of_transformers(without) < model_size(config).total


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    size = model_size(known_config(name))
    total, active = PUBLISHED[name]
    assert size.total / 1e9 == pytest.approx(total, rel=0.005)
    assert size.active / 1e9 == pytest.approx(active, rel=0.03)


def test_every_parameter_of_every_architecture_has_a_size():
    assert set(_SIZES) == {name for a in ARCHITECTURES.values() for name in a.layer_names}


def test_an_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="'qwen3': Qwen3 is dense"):
        model_size(known_config("Qwen/Qwen3-8B"))


def worker(devices: int, **layout: object) -> ActorTrainConfig:
    strategy = {"strategy_name": "megatron_train", "strategy_config": layout}
    return ActorTrainConfig(device_mapping=list(range(devices)), strategy_args=strategy)


@given(st.sampled_from(sorted(PUBLISHED)), st.integers(1, 5), st.sampled_from([1, 2, 3]))
def test_stages_and_chunks_together_hold_the_model(name, stages, chunks):
    size = model_size(known_config(name))
    shape = size.shape
    assume(chunks == 1 or stages > 1)
    sizes = [shape.num_layers // (stages * chunks)] * (stages * chunks)
    sizes[0] += shape.num_layers - sum(sizes)
    text = "|".join("t" * n for n in sizes)
    layout = {"pipeline_model_parallel_layout": f"E{text}L"} if stages > 1 else {}
    held = held_parameters(size, worker(stages, pipeline_model_parallel_size=stages, **layout))
    assert sum(chunk.dense + chunk.experts for stage in held for chunk in stage) == size.total
    assert [len(held), len(held[0])] == [stages, chunks]


@given(st.sampled_from(sorted(PUBLISHED)), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans())
def test_ranks_together_hold_each_split_parameter_once(name, tp, ep, split_experts):
    """Whole parameters are counted on each rank; the vocabulary divides in these models."""
    size = model_size(known_config(name))
    etp = tp if split_experts or ep == 1 else 1
    layout = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    ((held,),) = held_parameters(size, worker(tp * ep, **layout))
    whole = sum(w.size for layer in size.layers for w in layer if w.split is Split.WHOLE) + size.shape.hidden
    assert held.dense - held.tensor == whole
    assert held.tensor * tp + whole + held.experts * ep * etp == size.total


def test_the_vocabulary_is_padded_until_it_divides():
    size = model_size({**known_config("Qwen/Qwen3-30B-A3B"), "vocab_size": 151935})
    ((one,),), ((half,),) = (held_parameters(size, worker(tp, tensor_model_parallel_size=tp)) for tp in (1, 2))
    even = model_size(known_config("Qwen/Qwen3-30B-A3B"))
    ((wanted,),) = held_parameters(even, worker(2, tensor_model_parallel_size=2))
    assert half == wanted
    assert one.dense == even.total - one.experts - 2 * size.shape.hidden


def test_a_tied_output_layer_is_counted_once():
    config = known_config("Qwen/Qwen3-30B-A3B")
    tied, untied = (model_size({**config, "tie_word_embeddings": tie}) for tie in (True, False))
    ((a,),), ((b,),) = (held_parameters(size, worker(1)) for size in (tied, untied))
    assert b.dense - a.dense == untied.total - tied.total == 151936 * 2048


QWEN, V3 = "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3"
MISSING = object()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (QWEN, "hidden_size", MISSING),
        (QWEN, "hidden_size", "2048"),
        (QWEN, "hidden_size", 2048.0),
        (QWEN, "hidden_size", True),
        (QWEN, "hidden_size", 0),
        (QWEN, "intermediate_size", MISSING),
        (QWEN, "head_dim", -128),
        (QWEN, "moe_intermediate_size", [768]),
        ("Qwen/Qwen2-57B-A14B", "shared_expert_intermediate_size", "20480"),
        (V3, "q_lora_rank", MISSING),
        (V3, "q_lora_rank", "1536"),
        (V3, "kv_lora_rank", MISSING),
        (V3, "qk_rope_head_dim", None),
        (V3, "v_head_dim", 1.5),
        (V3, "n_shared_experts", "one"),
        *((QWEN, name, 10**400) for name in ("hidden_size", "intermediate_size", "head_dim", "moe_intermediate_size")),
        *((V3, name, MAX_SIZE + 1) for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim")),
    ],
)
def test_a_missing_or_invalid_size_is_named(name, field, value):
    config = {**known_config(name), field: value}
    if value is MISSING:
        del config[field]
    problem = shape_problem(config)
    assert problem.startswith(f"this config.json of a {config['model_type']} ")
    assert f" {field}" in problem
    assert len(problem) < 200
    with pytest.raises(ConfigError, match=field):
        model_size(config)


def test_known_models_have_all_sizes():
    for config in known_configs().values():
        known = config["model_type"] in ARCHITECTURES
        assert (shape_problem(config) == "") == known
    assert shape_problem({**known_config(QWEN), "head_dim": None}) == ""
    assert shape_problem({**known_config(V3), "q_lora_rank": None}) == ""


@pytest.mark.parametrize(
    ("name", "changes", "layout", "problem"),
    [
        (QWEN, {"num_attention_heads": 30}, {"tensor_model_parallel_size": 4}, "the number of attention heads, 30,"),
        (QWEN, {"num_key_value_heads": 6}, {"tensor_model_parallel_size": 4}, "the number of key and value heads, 6,"),
        (
            QWEN,
            {"num_key_value_heads": 1, "head_dim": 1},
            {"tensor_model_parallel_size": 4},
            "the width of queries, keys and values together, 34,",
        ),
        (
            QWEN,
            {"mlp_only_layers": [3], "intermediate_size": 6143},
            {"tensor_model_parallel_size": 2},
            "the width of a dense layer, 6,143,",
        ),
        (QWEN, {"moe_intermediate_size": 766}, {"tensor_model_parallel_size": 4}, "the width of an expert, 766,"),
        (
            QWEN,
            {"moe_intermediate_size": 766},
            {
                "tensor_model_parallel_size": 4,
                "expert_model_parallel_size": 4,
                "expert_tensor_parallel_size": 4,
            },
            "the width of an expert, 766,",
        ),
        (
            "Qwen/Qwen2-57B-A14B",
            {"shared_expert_intermediate_size": 20482},
            {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4},
            "the width of the shared expert, 20,482,",
        ),
        (
            "allenai/OLMoE-1B-7B-0924",
            {"num_key_value_heads": 1, "head_dim": 2},
            {"tensor_model_parallel_size": 4},
            "the width of keys, 2,",
        ),
        (
            V3,
            {"moe_intermediate_size": 2049},
            {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
            "the width of the shared expert, 2,049,",
        ),
    ],
)
def test_a_width_that_does_not_divide_is_named(name, changes, layout, problem):
    """A width is checked even if the elements of the parameter divide."""
    config, role = {**known_config(name), **changes}, worker(16, **layout)
    (found,) = width_problems(config, role)
    tp = layout["tensor_model_parallel_size"]
    assert found == f"{problem} does not divide over {'ETP' if 'an expert' in problem else 'TP'} {tp}"
    with pytest.raises(ValueError, match=problem):
        held_parameters(model_size(config), role)


@pytest.mark.parametrize(
    ("name", "changes", "layout"),
    [
        (QWEN, {}, {"tensor_model_parallel_size": 8}),  # two ranks share a key and value head
        (QWEN, {"vocab_size": 151935}, {"tensor_model_parallel_size": 2}),
        (QWEN, {"intermediate_size": 6143}, {"tensor_model_parallel_size": 2}),  # no layer is dense
        (
            QWEN,
            {"moe_intermediate_size": 767},
            {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},  # experts are whole
        ),
        (V3, {"num_key_value_heads": 3}, {"tensor_model_parallel_size": 8, "expert_model_parallel_size": 8}),
    ],
)
def test_padded_shared_and_whole_widths_need_not_divide(name, changes, layout):
    assert width_problems({**known_config(name), **changes}, worker(16, **layout)) == []


def test_experts_that_do_not_divide_are_named():
    size = model_size(known_config(QWEN))
    with pytest.raises(ValueError, match=r"^128 experts do not divide over EP 5$"):
        held_parameters(size, worker(5, expert_model_parallel_size=5))
