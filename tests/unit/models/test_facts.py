"""Which layers route, read from config.json; what does not fit is named."""

from __future__ import annotations

import json

import pytest

from roll_r3.errors import ConfigError
from roll_r3.models.checkpoint import resolve_checkpoint
from roll_r3.models.facts import facts_of, read_facts
from roll_r3.models.tiny import make_tiny_checkpoint

BASE = {
    "num_hidden_layers": 6,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "moe_layers"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "qwen3_moe", "num_local_experts": 8, "mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ({"model_type": "qwen2_moe", "num_experts": 8, "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"model_type": "mixtral", "num_local_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "olmoe", "num_experts": 8}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_moe_layers(config, moe_layers):
    facts = facts_of(BASE | config)
    assert facts.moe_layers == moe_layers
    assert facts.num_experts == 8


def test_an_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="'bert' is not known"):
        facts_of(BASE | {"model_type": "bert"})


def test_a_tiny_checkpoint_is_seeded_and_read_back(tmp_path):
    first, again, other = (make_tiny_checkpoint(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    facts = read_facts(first)
    assert (facts.num_layers, facts.num_experts, facts.top_k, facts.vocab_size) == (4, 16, 2, 260)
    weights = [(p / "model.safetensors").read_bytes() for p in (first, again, other)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no config"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    assert resolve_checkpoint(str(make_tiny_checkpoint(tmp_path / "m"))) == tmp_path / "m"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"mlp_only_layers": 3}, "cannot be read"),
    ],
)
def test_a_config_json_with_odd_values_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        facts_of(BASE | {"model_type": "qwen3_moe", "num_experts": 8} | change)


@pytest.mark.parametrize("name", [*BASE, "num_experts"])
def test_a_config_json_without_a_field_names_it(name):
    config = BASE | {"model_type": "qwen3_moe", "num_experts": 8}
    with pytest.raises(ConfigError, match=f"has no {name}"):
        facts_of({key: value for key, value in config.items() if key != name})


def test_a_tiny_config_json_is_plain_json(tmp_path):
    path = make_tiny_checkpoint(tmp_path / "m", num_experts=4)
    assert json.loads((path / "config.json").read_text())["num_local_experts"] == 4
