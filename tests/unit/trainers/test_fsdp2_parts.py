"""Parts of the FSDP2 trainer without a process group."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from roll_r3.config.workers import TrainingArgs
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint
from roll_r3.trainers.learning_rate import learning_rate


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_after_warm_up_the_learning_rate_is_that_of_megatrons_scheduler(style: str, warmup: int) -> None:
    from roll_r3.platform import megatron_cpu

    megatron_cpu.install()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    args = TrainingArgs(learning_rate=1e-3, lr_scheduler_type=style, warmup_steps=warmup, min_lr=1e-4)
    group = {"lr": 0.0}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=warmup,
        lr_decay_steps=8,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    for done in range(11):
        if done >= warmup:
            assert learning_rate(args, done, 8) == pytest.approx(group["lr"], rel=1e-12)
        scheduler.step(increment=1)


def test_warm_up_begins_with_a_step_that_learns_and_ends_at_the_peak() -> None:
    args = TrainingArgs(learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=4, min_lr=1e-4)
    rates = [learning_rate(args, done, 13) for done in range(13)]
    assert rates[:5] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert rates[5:] == pytest.approx([1e-3 - 1e-4 * step for step in range(1, 9)])  # to min_lr after the last one


def test_gates_of_another_choice_carry_gradients_to_the_router() -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    from roll_r3.trainers.fsdp2.routers import HookedRouter

    gate = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=64, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True)
    )
    router = HookedRouter(gate, 0, recomputed=False)
    chosen = torch.tensor([[3, 5]] * 6)
    asked = []

    def route(num_tokens: int, topk: int, live: object) -> torch.Tensor:
        asked.append((num_tokens, topk))
        return chosen

    router.attach(SimpleNamespace(route=route))
    logits, gates, ids = gate(torch.randn(6, 64))
    wanted = logits.softmax(-1)[:, [3, 5]]
    assert torch.equal(ids, chosen) and asked == [(6, 2)]
    assert torch.allclose(gates, wanted / wanted.sum(-1, keepdim=True), atol=1e-7)
    gates[:, 0].sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    router.detach()
    router.detach()
    assert not gate._forward_hooks and not router.attached


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_checkpoint_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from roll_r3.models.hf.tensor_parts import parts_of
    from roll_r3.trainers.fsdp2.weights import CheckpointReader

    make_tiny_checkpoint(tmp_path, name, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    architecture = ARCHITECTURES[TINY_MODELS[name]]
    on_disk = load_file(tmp_path / "model.safetensors")
    named = set()
    with CheckpointReader(tmp_path) as checkpoint:
        for key, wanted in model.state_dict().items():
            found = torch.full_like(wanted, torch.nan)
            checkpoint.fill(found, key, architecture)
            assert torch.equal(found, wanted), key
            for part, index in parts_of(key, wanted.shape, architecture):
                assert torch.equal(wanted[index], on_disk[part])
                named.add(part)
    assert named == set(on_disk)


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    from roll_r3.trainers.fsdp2.weights import CheckpointReader

    architecture = ARCHITECTURES["qwen3_moe"]
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        CheckpointReader(tmp_path)
    save_file({"model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(["model.norm.weight", "lm_head.weight"], "a.safetensors")})
    )
    with CheckpointReader(tmp_path) as checkpoint:
        checkpoint.fill(filled := torch.zeros(3), "model.norm.weight", architecture)
        assert torch.equal(filled, torch.ones(3))
        with pytest.raises(ConfigError, match=r"lm_head\.weight of .* is \[2, 3\], but config\.json requires \[4, 3\]"):
            checkpoint.fill(torch.zeros(4, 3), "lm_head.weight", architecture)
        with pytest.raises(ConfigError, match=r"no tensor model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight"):
            checkpoint.fill(torch.zeros(2, 4, 3), "model.layers.0.mlp.experts.gate_up_proj", architecture)


def test_a_buffer_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    """Arbitrary memory would be in it without an error, since it is no longer a meta tensor."""
    from roll_r3.trainers.fsdp2.model import _fill
    from roll_r3.trainers.fsdp2.weights import CheckpointReader

    with torch.device("meta"):
        layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
        layer[0].register_buffer("scale", torch.ones(2), persistent=False)
    save_file({"model.layers.4.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with (
        CheckpointReader(tmp_path) as checkpoint,
        pytest.raises(ConfigError, match=r"cannot fill model\.layers\.4\.0\.scale: checkpoints do not contain it"),
    ):
        _fill([("model.layers.4.", layer)], checkpoint, ARCHITECTURES["qwen3_moe"], torch.device("cpu"))


def test_log_probs_and_entropy_are_those_of_a_softmax() -> None:
    from roll_r3.trainers.fsdp2.token_values import label_log_probs_and_entropy

    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(7, (2, 3))
    for entropy_gradient in (False, True):
        log_probs, entropy = label_log_probs_and_entropy(
            logits, labels, temperature=0.7, entropy_gradient=entropy_gradient
        )
        whole = torch.distributions.Categorical(logits=logits.detach().double() / 0.7)
        assert torch.allclose(log_probs.double(), whole.log_prob(labels), atol=1e-5)
        assert torch.allclose(entropy.double(), whole.entropy(), atol=1e-5)
        assert log_probs.requires_grad and entropy.requires_grad == entropy_gradient
