"""Settings that go out with each request, and the room of an engine."""

from __future__ import annotations

from typing import Any

import pytest

from roll_r3.config.derived import engine_room, evaluation_sampling, samples_at_once, sampling, server
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import KEPT_LIMIT, Sampling
from roll_r3.config.sections import ValidationConfig


def config(strategy: str = "sglang", settings: dict[str, Any] | None = None, **generating: Any) -> RLVRConfig:
    infer = {
        "strategy_args": {"strategy_name": strategy, "strategy_config": settings or {}},
        "generating_args": generating,
    }
    fields = {"exp_name": "x", "pretrain": "p", "response_length": 30, "actor_train": {}, "actor_infer": infer}
    return RLVRConfig.model_validate(fields)


def test_training_samples_as_generating_args_say() -> None:
    assert sampling(config()) == Sampling(max_new_tokens=30)
    given = {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "stop_token_ids": (3,),
        "stop_strings": ("</a>",),
    }
    assert sampling(config(**given)) == Sampling(**given, return_kept=True)
    assert sampling(config(**given, sampling_mask=False)) == Sampling(**given)
    assert sampling(config(sampling_mask=True)) == Sampling(max_new_tokens=30), "nothing is truncated"


@pytest.mark.parametrize("mask", ["auto", True])
@pytest.mark.parametrize("strategy", ["sglang", "vllm", "hf_infer"])
def test_a_set_of_top_p_has_a_limit(strategy: str, mask: Any) -> None:
    found = sampling(config(strategy, top_p=0.9, sampling_mask=mask))
    assert (found.top_k, found.return_kept) == (KEPT_LIMIT, True)
    assert sampling(config(strategy, top_p=0.9, top_k=5000, sampling_mask=mask)).top_k == 5000
    assert sampling(config(strategy, top_p=0.9, sampling_mask=False)).top_k == -1


def evaluated(strategy: str = "sglang", **validation: Any) -> RLVRConfig:
    section = ValidationConfig.model_validate({"data_args": {"file_name": "a"}} | validation)
    return config(strategy, max_new_tokens=20, temperature=0.5).model_copy(update={"validation": section})


def test_an_evaluation_samples_by_its_own_settings() -> None:
    assert evaluation_sampling(evaluated()) == Sampling(max_new_tokens=30), "nothing of training's but the default"
    given = {"max_new_tokens": 99, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop_token_ids": (3,)}
    assert evaluation_sampling(evaluated(generating_args=given)) == Sampling(**given)
    assert evaluation_sampling(evaluated(val_greedy=True)) == Sampling(max_new_tokens=30, greedy=True)


def test_an_engine_has_room_for_the_longest_sample_of_training_and_evaluation() -> None:
    longer = evaluated(generating_args={"max_new_tokens": 99})
    assert engine_room(longer) == longer.prompt_length + 99 + 2
    assert engine_room(evaluated("vllm", generating_args={"max_new_tokens": 5})) == longer.prompt_length + 20
    assert engine_room(evaluated("vllm")) == longer.prompt_length + 30


@pytest.mark.parametrize(
    ("strategy", "settings", "room"),
    [
        ("sglang", {}, 512),
        ("sglang", {"max_concurrent_requests": 8}, 8),
        ("vllm", {"max_running_requests": 16}, 16),
        ("vllm", {"max_running_requests": 16, "max_concurrent_requests": 8}, 8),
    ],
)
def test_an_engines_room_is_the_smallest_of_its_limits(strategy: str, settings: dict[str, Any], room: int) -> None:
    found = server(config(strategy, settings))
    assert found is not None
    assert samples_at_once(found) == room
