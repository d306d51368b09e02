"""Rollout engines in ROLL's files: SGLang's and vLLM's settings, and keys shared by both."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.strategies import VllmConfig
from roll_r3.engines.vllm.server import args_that_lose_routes, refused_server_args
from roll_r3.from_roll.key_rows import Custom, Unsupported
from roll_r3.from_roll.tables import TABLES
from tests.unit.from_roll.cases import ENGINE, at, of_roll, put, run

INFER = "actor_infer.strategy_args"
VLLM_ROWS = TABLES["vLLM"][1]


def engine(name: str, settings: Any, **changes: Any) -> dict[str, Any]:
    """Return a small file of ROLL with `settings` of the engine `name`."""
    return of_roll(actor_infer__strategy_args={"strategy_name": name, "strategy_config": settings}, **changes)


def names_of(kind: type) -> list[str]:
    """Return vLLM's keys with rows of a kind."""
    return [key.rpartition(".")[2] for row in VLLM_ROWS if isinstance(row.treatment, kind) for key in row.keys]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gpu_memory_utilization": 0.8}, {"gpu_memory_utilization": 0.8}),
        ({"tensor_parallel_size": 4}, {"tp_size": 4}),
        ({"tensor_parallel_size": 1}, {}),
        ({"max_model_len": 8000}, {"context_length": 8000}),
        ({"max_num_seqs": 64}, {"max_running_requests": 64}),
        ({"max_num_batched_tokens": 8192}, {"server_args": {"max_num_batched_tokens": 8192}}),
        (
            {"enforce_eager": True, "disable_custom_all_reduce": False},
            {"server_args": {"enforce_eager": True, "disable_custom_all_reduce": False}},
        ),
        (
            {"compilation_config": {"cudagraph_mode": "NONE"}},
            {"server_args": {"compilation_config": '{"cudagraph_mode": "NONE"}'}},
        ),
        ({"max_num_seqs": None, "enforce_eager": None, "dtype": None}, {}),
        ({"pipeline_parallel_size": 1, "data_parallel_size": 1, "hf_overrides": {}, "enable_lora": False}, {}),
    ],
)
def test_a_setting_of_vllms_becomes_what_it_means(settings, expected):
    translated, named = run(engine("vllm", settings))
    assert at(translated, ENGINE) == expected
    assert {"roll-unsupported", "roll-unread"}.isdisjoint(named)
    given = {f"{ENGINE}.{name}" for name, value in settings.items() if value is not None and name not in expected}
    if expected:
        assert given <= set(named["roll-translated"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_format", "dummy"),
        ("sleep_level", 2),
        ("block_size", 16),
        ("enable_prefix_caching", False),
        ("disable_log_stats", True),
        ("dtype", "float16"),
        ("seed", 1),
        ("logprobs_mode", "processed_logprobs"),
        ("distributed_executor_backend", "ray"),
        ("VLLM_USE_V1", 1),
        ("swap_space", 16),
    ],
)
def test_a_setting_of_vllms_without_effect_is_listed_and_left_out(name, value):
    translated, named = run(engine("vllm", {"gpu_memory_utilization": 0.8, name: value}))
    assert at(translated, ENGINE) == {"gpu_memory_utilization": 0.8}
    assert named["roll-unread"] == (f"{ENGINE}.{name}",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"),
        ("hf_overrides", {"quantization_config": {"fmt": "e4m3"}}),
        ("speculative_config", {"method": "mtp"}),
        ("pipeline_parallel_size", 2),
        ("data_parallel_size", 8),
        ("enable_eplb", True),
        ("num_gpu_blocks_override", 1000),
        ("cpu_offload_gb", 4),
        ("worker_extension_cls", "my.Worker"),
    ],
)
def test_a_setting_of_vllms_that_would_change_the_run_is_refused(name, value):
    translated, named = run(engine("vllm", {name: value}))
    assert at(translated, ENGINE) == {}
    assert named["roll-unsupported"] == (f"{ENGINE}.{name}",)


def test_what_vllm_is_handed_its_strategy_takes():
    handed = VllmConfig(server_args=dict.fromkeys(names_of(Custom), True))
    assert handed.server_args
    assert args_that_lose_routes(handed) + refused_server_args(handed) == []


def test_what_the_strategy_refuses_of_vllms_is_refused_of_rolls_too():
    refused = names_of(Unsupported)
    assert refused
    for name in set(refused) - {"online_quantization", "worker_cls", "worker_extension_cls"}:  # ROLL's own, and code
        given = VllmConfig(server_args={name: 1})
        assert args_that_lose_routes(given) + refused_server_args(given), name


def test_a_size_of_vllms_is_its_tensor_parallel_size():
    translated, named = run(engine("vllm", {"tensor_parallel_size": 2}, actor_infer__num_gpus_per_worker=8))
    assert at(translated, ENGINE) == {"tp_size": 2}
    assert named["roll-unread"] == ("actor_infer.num_gpus_per_worker",)
    alone, named = run(engine("vllm", {}, actor_infer__num_gpus_per_worker=8))
    assert at(alone, ENGINE) == {}, "ROLL replaces it"
    assert named["roll-unread"] == ("actor_infer.num_gpus_per_worker",)
    _, named = run(engine("vllm", {"tensor_parallel_size": 2, "tp_size": 4}))
    assert named["roll-unsupported"] == (f"{ENGINE}.tensor_parallel_size",)


@pytest.mark.parametrize("name", ["sglang", "vllm", "hf_infer"])
def test_precision_and_groups_of_weights_are_said_alike_for_every_engine(name):
    data = engine(name, {}, actor_infer__model_args={"dtype": "fp32"}, model_update_buffer_size_mb=256)
    translated, named = run(data)
    assert at(translated, ENGINE) == {"dtype": "float32", "weight_bucket_mb": 256}
    assert at(translated, "actor_infer.model_args") == {}
    assert "roll-unread" not in named


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_rolls_engine_computes_in_the_precision_of_its_model(name):
    data = engine(name, {"dtype": "float16"}, actor_infer__model_args={"dtype": "fp32"})
    translated, named = run(data)
    assert at(translated, ENGINE) == {"dtype": "float32"}
    assert named["roll-unread"] == (f"{ENGINE}.dtype",)
    ours = {"actor_infer": {"strategy_args": {"strategy_name": name, "strategy_config": {"dtype": "float16"}}}}
    assert run(ours) == (ours, {}), "in a file of our own it is what it says"


@pytest.mark.parametrize("name", ["sglang", "vllm", "hf_infer"])
def test_an_engine_may_have_no_settings(name):
    translated, named = run(engine(name, None))
    assert at(translated, INFER) == {"strategy_name": name}
    assert not any(path.startswith(INFER) for paths in named.values() for path in paths)


def test_each_engine_has_keys_of_its_own():
    of_vllm = {"block_size": 16, "max_num_seqs": 4}
    of_sglang = {"page_size": 1, "enable_memory_saver": True}
    for name, foreign in (("sglang", of_vllm), ("vllm", of_sglang), ("hf_infer", of_vllm | of_sglang)):
        translated, named = run(engine(name, foreign))
        assert at(translated, ENGINE) == foreign, "the models say that there is no such field"
        assert "roll-unread" not in named


def test_settings_of_our_own_stay_beside_rolls():
    settings = {"python": "env/bin/python", "server_args": {"enforce_eager": True}, "max_num_batched_tokens": 512}
    translated, _ = run(engine("vllm", settings))
    together = {"enforce_eager": True, "max_num_batched_tokens": 512}
    assert at(translated, ENGINE) == {"python": "env/bin/python", "server_args": together}


def test_transformers_can_sample():
    args = {"strategy_name": "hf_infer", "strategy_config": {"dtype": "float32"}}
    translated, named = run(of_roll(actor_infer__strategy_args=args))
    assert translated["actor_infer"]["strategy_args"] == args
    assert "actor_infer.strategy_args.strategy_name" not in named.get("roll-unsupported", ())


def test_transformers_cannot_train():
    _, named = run(put(of_roll(), "actor_train.strategy_args.strategy_name", "hf_infer"))
    assert named["roll-unsupported"] == ("actor_train.strategy_args.strategy_name",)
    assert at(run(put(of_roll(), f"{INFER}.strategy_name", "deepspeed_infer"))[0], INFER) is ABSENT
