"""MoE layers read from config.json; invalid values are named."""

from __future__ import annotations

import json
import runpy

import pytest

from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import unbuildable
from roll_r3.models.checkpoint_files import hub_cache, is_hub_name, resolve_checkpoint
from roll_r3.models.facts import facts_of, read_facts
from roll_r3.models.tiny import make_tiny_checkpoint

BASE = {
    "num_hidden_layers": 6,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}
DEEPSEEK = {"model_type": "deepseek_v3", "n_routed_experts": 8}


@pytest.mark.parametrize(
    ("config", "moe_layers"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "qwen3_moe", "num_local_experts": 8, "mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
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


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    assert resolve_checkpoint(str(make_tiny_checkpoint(tmp_path / "m"))) == tmp_path / "m"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers must be an integer of at least 1, got null"),
        ({"vocab_size": "many"}, 'vocab_size must be an integer of at least 1, got "many"'),
        ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of layer numbers, got 3"),
        ({"mlp_only_layers": "xxx"}, 'mlp_only_layers must be a list of layer numbers, got "xxx"'),
        ({"mlp_only_layers": {"1": 1}}, "must be a list"),
        ({"mlp_only_layers": [1, "2"]}, "must be a list"),
        ({"mlp_only_layers": [True]}, "must be a list"),
        ({"mlp_only_layers": [-1]}, "must be a list"),
        ({"mlp_only_layers": ""}, "must be a list"),
        ({"decoder_sparse_step": 1.5}, "decoder_sparse_step must be an integer of at least 1, got 1.5"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step must be an integer of at least 1, got -1"),
        (DEEPSEEK | {"moe_layer_freq": [1]}, r"moe_layer_freq must be an integer of at least 1, got \[1\]"),
        (DEEPSEEK | {"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer of at least 0, got -1"),
        (
            DEEPSEEK | {"first_k_dense_replace": True},
            "first_k_dense_replace must be an integer of at least 0, got true",
        ),
        *(({name: 10**400}, f"{name} must be at most [0-9]+, got 10+[.]{{3}}") for name in BASE),
        ({"decoder_sparse_step": 0}, "cannot be read"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer of at least 1, got true"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, got 1000000000"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8, got 9"),
        ({"num_experts": 100_000}, "num_experts must be at most 65536, got 100000"),
        (DEEPSEEK | {"moe_layer_freq": 0}, "cannot be read"),
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


def test_as_many_experts_as_routes_can_name():
    assert facts_of(BASE | {"model_type": "mixtral", "num_local_experts": 65536}).num_experts == 65536


NAMES = [
    "a/b", "Qwen/Qwen3-30B-A3B", "a_b/c.d", "_/_", "output/qwen3--sft", "models/-x", "models/x.", "models/x-", ".a/b",
    "a/..b", "a/b..c", "a/b.git", "a" * 96 + "/" + "b" * 96, "a" * 97 + "/b", "a/" + "b" * 97, "a/b\n", "\u00e9/b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_hub_names_are_those_of_the_hubs_client(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_hub_name(name)
    else:
        assert is_hub_name(name)


def test_a_name_refused_by_the_hubs_client_is_a_configuration_error(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def refuse(name, **kwargs):
        raise HFValidationError("not such a name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="not such a name"):
        resolve_checkpoint("someone/some-model")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "/a"},
        {"HF_HUB_CACHE": "~/b"},
        {"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/c", "HF_HUB_CACHE": "$HOME/b", "HF_HOME": "/a"},
        {"XDG_CACHE_HOME": "/d"},
        {"XDG_CACHE_HOME": "/d", "HF_HOME": "$XDG_CACHE_HOME/e"},
    ],
)
def test_the_hubs_cache_is_found_like_by_its_client(monkeypatch, environment):
    from huggingface_hub import constants

    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(hub_cache()) == runpy.run_path(constants.__file__)["HF_HUB_CACHE"]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '"x"', "null", "\udcff"])
def test_a_file_with_other_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="is not"):
        read_facts(tmp_path)


def test_a_file_above_the_limit_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(ConfigError, match="more than"):
        read_facts(tmp_path)


def test_settings_that_cannot_be_read_are_a_reason():
    config = {"num_experts_per_tok": 2, "topk_group": 0}
    assert unbuildable(ARCHITECTURES["deepseek_v3"], config) == [
        "its settings cannot be read: integer division or modulo by zero"
    ]
