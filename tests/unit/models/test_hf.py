"""Models of transformers: routers, gates and norms; code of a checkpoint is never run."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from own_code import with_code_of_its_own
from transformers import AutoConfig, AutoModelForCausalLM

from roll_r3.engines.hf.model import _read_model
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import TINY
from roll_r3.models.facts import facts_of
from roll_r3.models.hf.config import read_hf_config
from roll_r3.models.hf.norms import set_latent_epsilon
from roll_r3.models.hf.routers import GATES, find_routers, router_class
from roll_r3.models.hf.tokenizer import read_tokenizer
from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_gates_of_the_routers_own_choice_are_its_own_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    architecture = ARCHITECTURES[TINY_MODELS[name]]
    config = AutoConfig.for_model(architecture.model_type, **{**TINY, **architecture.tiny[name], "vocab_size": 32})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for module_name, buffer in model.named_buffers():
        if module_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    routers = find_routers(model, facts_of(config.to_dict()).moe_layers)
    for router in routers:
        router.weight.data.normal_()
        logits, gates, ids = router(torch.randn(1, 40, 64, dtype=dtype))
        ours = GATES[router_class(router)](router, logits, ids)
        assert ours.dtype == gates.dtype
        assert torch.equal(ours, gates)


UNLIKELY = [
    *((router, {"norm_topk_prob": True}, gap)
      for router in ("Qwen3MoeTopKRouter", "MixtralTopKRouter")
      for gap in (0.0, 40.0, 60.0, 85.0, 95.0, 110.0, 200.0)),
    # sigmoids vanish below -88, in the model and in every trainer
    *(("DeepseekV3TopkRouter", {"norm_topk_prob": True, "routed_scaling_factor": 2.5}, gap) for gap in (0.0, 85.0)),
]  # fmt: skip


@pytest.mark.parametrize(("router", "settings", "gap"), UNLIKELY)
def test_gates_of_unlikely_experts_are_numbers_and_so_are_their_gradients(
    router: str, settings: dict[str, object], gap: float
) -> None:
    """Replayed experts may be less likely than the smallest fp32 number."""
    values = torch.tensor([[gap, 0.0, 1.0, -0.5], [0.3, 0.1, 1.0, -0.5]])
    if router.startswith("Deepseek"):
        values[0, 1:] -= gap / 4  # keeps the 1e-20 added by the model out of the reference
    ids, weights = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    logits, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    gates = GATES[router](types.SimpleNamespace(**settings), logits, ids)
    scores = exact.sigmoid() if router.startswith("Deepseek") else exact.softmax(-1)
    chosen = scores.gather(1, ids)
    wanted = chosen / chosen.sum(-1, keepdim=True) * settings.get("routed_scaling_factor", 1.0)
    (gates * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(gates.double(), wanted, rtol=1e-5, atol=0)
    assert torch.isfinite(logits.grad).all()
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


class MixtralTopKRouter(torch.nn.Module):
    """Router with a class name of transformers."""


class UnheardOfRouter(torch.nn.Module):
    """Router with an unknown class name."""


def model(*gates: torch.nn.Module) -> torch.nn.Module:
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"gate": gate}) for gate in gates)
    whole = torch.nn.Module()
    whole.model = torch.nn.Module()
    whole.model.layers = layers
    return whole


def test_routers_are_found_in_the_order_of_their_layers() -> None:
    first, last = MixtralTopKRouter(), MixtralTopKRouter()
    assert find_routers(model(first, torch.nn.Identity(), last), (0, 2)) == [first, last]


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (UnheardOfRouter(), "layer 1 of Module must have one router of .*, got UnheardOfRouter"),
        (torch.nn.Linear(2, 2), "layer 1 of Module must have one router of .*, got Linear"),
        (torch.nn.ModuleList([MixtralTopKRouter(), UnheardOfRouter()]), "got MixtralTopKRouter, UnheardOfRouter"),
    ],
)
def test_an_unknown_router_is_refused_by_its_class(gate: torch.nn.Module, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_routers(model(MixtralTopKRouter(), gate), (0, 1))


def test_a_router_where_none_is_expected_is_refused() -> None:
    with pytest.raises(ConfigError, match="got UnheardOfRouter"):
        find_routers(model(MixtralTopKRouter(), UnheardOfRouter()), (0,))
    with pytest.raises(ConfigError, match=r"has routers in layers \[0, 1\], its config.json in \[1\]"):
        find_routers(model(MixtralTopKRouter(), MixtralTopKRouter()), (1,))


def test_a_configuration_is_the_librarys_own_and_leaves_nothing_to_chance(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(
        tmp_path / "tiny", "mixtral", router_jitter_noise=0.1, attention_dropout=0.1, output_router_logits=True
    )
    ran = with_code_of_its_own(checkpoint)
    config = read_hf_config(checkpoint)
    assert type(config).__module__.startswith("transformers.")
    assert (config.router_jitter_noise, config.attention_dropout, config.output_router_logits) == (0, 0, False)
    assert not ran.exists()


def test_a_checkpoint_does_not_say_what_computes_its_attention_and_experts(tmp_path: Path) -> None:
    """A repository name for attention would make transformers fetch a kernel and run it."""
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    wanted = AutoModelForCausalLM.from_config(read_hf_config(checkpoint)).config
    file = checkpoint / "config.json"
    for names in (
        ("attn_implementation", "experts_implementation"),
        ("_attn_implementation", "_experts_implementation"),
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), **dict.fromkeys(names, "org/kernel")}))
        found = AutoModelForCausalLM.from_config(read_hf_config(checkpoint)).config
        assert found._attn_implementation == wanted._attn_implementation == "sdpa"
        assert found._experts_implementation == wanted._experts_implementation
    given = AutoModelForCausalLM.from_config(read_hf_config(checkpoint), attn_implementation="eager").config
    assert given._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "qwen3_moe"])
def test_latent_norms_have_the_epsilon_of_config_json(name: str) -> None:
    """transformers uses 1e-6 in every model; another epsilon changes every log-probability."""
    architecture = ARCHITECTURES[TINY_MODELS[name]]
    fields = {**TINY, **architecture.tiny[name], "vocab_size": 32, "rms_norm_eps": 1e-3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.model_type, **fields))
    set_latent_epsilon(model)
    norms = {name: module for name, module in model.named_modules() if name.endswith("norm")}
    assert len(norms) > 8
    assert {norm.variance_epsilon for norm in norms.values()} == {1e-3}


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight"])
def test_a_rollout_with_transformers_sets_the_epsilon_of_latent_norms(name: str, tmp_path: Path) -> None:
    model = _read_model(make_tiny_checkpoint(tmp_path, name), torch.float32)
    assert {norm.variance_epsilon for key, norm in model.named_modules() if key.endswith("norm")} == {1e-5}


@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizer_runs_no_code_of_the_model(trusted: bool, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny")
    ran = with_code_of_its_own(checkpoint)
    assert read_tokenizer(checkpoint, trust_remote_code=trusted).decode([72]) != ""
    assert not ran.exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama': Llama is dense"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
        ({"mlp_bias": True}, "is not built with transformers: mlp_bias is true"),
    ],
)
def test_unsupported_models_are_refused(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    file = make_tiny_checkpoint(tmp_path / "tiny") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ConfigError, match=said):
        read_hf_config(file.parent)
