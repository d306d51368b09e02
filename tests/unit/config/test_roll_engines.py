"""ROLL's strategies beside Megatron and SGLang, and their settings."""

from __future__ import annotations

from tests.unit.config.from_roll import of_roll, run


def test_vllm_keys_are_left_to_the_strategy():
    settings = {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 2, "load_format": "dummy", "page_size": 1}
    args = {"strategy_name": "vllm", "strategy_config": settings}
    translated, named = run(of_roll(actor_infer__strategy_args=args, actor_infer__num_gpus_per_worker=2))
    assert translated["actor_infer"]["strategy_args"] == args
    assert "actor_infer.num_gpus_per_worker" in named["roll-unread"]


def test_settings_of_another_trainer_are_left_to_its_strategy():
    args = {"strategy_name": "fsdp2_train", "strategy_config": {"optimizer": "x", "sequence_parallel": True}}
    assert run(of_roll(actor_train__strategy_args=args))[0]["actor_train"]["strategy_args"] == args


def test_transformers_can_sample():
    args = {"strategy_name": "hf_infer", "strategy_config": {"dtype": "float32"}}
    translated, named = run(of_roll(actor_infer__strategy_args=args))
    assert translated["actor_infer"]["strategy_args"] == args
    assert "actor_infer.strategy_args.strategy_name" not in named.get("roll-unsupported", ())
