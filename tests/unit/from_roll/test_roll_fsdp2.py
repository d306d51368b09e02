"""FSDP2 in ROLL's files, and a reference run by transformers."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.findings.report import ABSENT
from tests.unit.from_roll.cases import LAYOUT, at, of_roll, run

MODEL = "actor_train.model_args"


def fsdp2(settings: dict[str, Any], model: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a small file of ROLL with FSDP2 as trainer."""
    args = {"strategy_name": "fsdp2_train", "strategy_config": settings}
    return of_roll(actor_train__strategy_args=args, actor_train__model_args=model or {})


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        ({"reshard_after_forward": False}, {}, {f"{LAYOUT}.reshard_after_forward": False}),
        ({"param_dtype": "bfloat16"}, {}, {f"{MODEL}.dtype": "bf16", f"{LAYOUT}.param_dtype": ABSENT}),
        ({"param_dtype": "float32"}, {"dtype": "bf16"}, {f"{MODEL}.dtype": "fp32"}),
        ({"param_dtype": None}, {"dtype": "bf16"}, {f"{MODEL}.dtype": "bf16", f"{LAYOUT}.param_dtype": ABSENT}),
        ({}, {"dtype": "fp32"}, {f"{MODEL}.dtype": ABSENT}),
        (
            {},
            {"disable_gradient_checkpointing": True},
            {f"{LAYOUT}.recompute": False, f"{MODEL}.disable_gradient_checkpointing": ABSENT},
        ),
        ({}, {"disable_gradient_checkpointing": False}, {f"{LAYOUT}.recompute": True}),
        ({}, {}, {f"{LAYOUT}.recompute": True}),
        (
            {},
            {"attn_implementation": "eager"},
            {f"{LAYOUT}.attn_implementation": "eager", f"{MODEL}.attn_implementation": ABSENT},
        ),
        ({}, {"attn_implementation": "fa2"}, {f"{LAYOUT}.attn_implementation": ABSENT}),
        ({}, {"ulysses_size": 1, "model_config_kwargs": {}}, {MODEL: {}}),
    ],
)
def test_a_setting_becomes_what_it_means(settings, model, expected):
    translated, named = run(fsdp2(settings, model))
    assert {path: at(translated, path) for path in expected} == expected
    assert "roll-unsupported" not in named


def test_precision_that_roll_does_not_read_is_listed():
    _, named = run(fsdp2({"param_dtype": "fp32"}, {"dtype": "bf16"}))
    assert named["roll-unread"] == (f"{MODEL}.dtype",)
    ours = {"actor_train": {"strategy_args": {"strategy_name": "fsdp2_train"}, "model_args": {"dtype": "fp32"}}}
    assert run(ours) == (ours, {}), "in a file of our own it is what it says"


@pytest.mark.parametrize(
    ("settings", "model", "listed"),
    [
        ({"fsdp_size": 4}, {}, f"{LAYOUT}.fsdp_size"),
        ({"reduce_dtype": "bf16"}, {}, f"{LAYOUT}.reduce_dtype"),
        ({"offload_policy": True}, {}, f"{LAYOUT}.offload_policy"),
        ({"wrap_policy": {"moe_experts": ["Qwen3MoeMLP"]}}, {}, f"{LAYOUT}.wrap_policy"),
        ({"apply_tiled_mlp": True}, {}, f"{LAYOUT}.apply_tiled_mlp"),
        ({"async_save_ckpt": True}, {}, f"{LAYOUT}.async_save_ckpt"),
        ({}, {"attn_implementation": "fa2"}, f"{MODEL}.attn_implementation"),
        ({}, {"device_map": "balanced"}, f"{MODEL}.device_map"),
    ],
)
def test_a_setting_without_effect_is_listed(settings, model, listed):
    translated, named = run(fsdp2(settings, model))
    assert named["roll-unread"] == (listed,)
    assert at(translated, listed) is ABSENT


@pytest.mark.parametrize(
    ("settings", "model", "refused"),
    [
        ({"param_dtype": "fp16"}, {}, f"{LAYOUT}.param_dtype"),
        ({}, {"ulysses_size": 2}, f"{MODEL}.ulysses_size"),
        ({}, {"model_config_kwargs": {"num_experts_per_tok": 2}}, f"{MODEL}.model_config_kwargs"),
        ({}, {"moe_aux_loss_coef": 0.01}, f"{MODEL}.moe_aux_loss_coef"),
    ],
)
def test_a_setting_that_would_change_the_run_is_refused(settings, model, refused):
    translated, named = run(fsdp2(settings, model))
    assert named["roll-unsupported"] == (refused,)
    assert at(translated, refused) is ABSENT


def test_settings_of_megatrons_are_left_to_the_models():
    foreign = {"optimizer": "x", "sequence_parallel": True}
    translated, _ = run(fsdp2(foreign))
    assert at(translated, LAYOUT) == foreign | {"recompute": True}


def test_megatron_is_not_told_what_transformers_would_be():
    translated, named = run(of_roll(actor_train__model_args={"disable_gradient_checkpointing": True}))
    assert named["roll-unread"] == (f"{MODEL}.disable_gradient_checkpointing",)
    assert at(translated, LAYOUT) is ABSENT


def test_a_reference_that_transformers_runs_is_fsdp2s():
    model = {"attn_implementation": "sdpa", "disable_gradient_checkpointing": True, "dtype": "bf16"}
    reference = {"strategy_args": {"strategy_name": "hf_infer", "strategy_config": None}, "model_args": model}
    translated, named = run(of_roll(use_kl_loss=True, reference=reference))
    assert translated["reference"] == {
        "strategy_args": {"strategy_name": "fsdp2_infer", "strategy_config": {"attn_implementation": "sdpa"}},
        "model_args": {"dtype": "bf16"},
    }
    assert "reference.strategy_args.strategy_name" in named["roll-translated"]
    assert named["roll-unread"] == ("reference.model_args.disable_gradient_checkpointing",)
