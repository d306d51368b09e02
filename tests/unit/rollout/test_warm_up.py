"""What a server is asked for, and that prompts are shared only where its cache was seen to keep them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.strategies.base import GenerateRequest
from roll_r3.strategies.rollout.answers import Asked
from roll_r3.strategies.rollout.sampling import Sample, SampleError, SampleRequest
from roll_r3.strategies.rollout.server import ServerRollout
from roll_r3.strategies.rollout.sglang.strategy import SglangRollout
from roll_r3.strategies.rollout.vllm.strategy import VllmRollout

STRATEGIES = {"sglang": SglangRollout, "vllm": VllmRollout}
TRAJECTORY = Trajectory("x", np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", (0,))
METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",enable_prefix_caching="True",engine="0"} 1.0
"""


def rollout(name: str, response_length: int = 200) -> ServerRollout[Any]:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": "/models/tiny",
            "prompt_length": 64,
            "response_length": response_length,
            "actor_train": {},
            "actor_infer": {"router_replay": {"mode": "R3"}, "strategy_args": {"strategy_name": name}},
        }
    )
    return STRATEGIES[name](config=config, engine_index=0, device="cpu", gpu_ids=(), log_path=Path("/dev/null"))


class Client:
    def __init__(self, text: str) -> None:
        self.text = text

    async def get(self, path: str, timeout_s: float) -> bytes:
        return self.text.encode()


def test_a_request_names_its_rows_and_its_key():
    asked = Asked(SampleRequest((1, 2, 3), "s", 7, 2, 2, "key"), 5, 0, record_routes=True)
    body = rollout("sglang").request(asked)
    assert (body["return_routed_experts"], body["routed_experts_start_len"], body["extra_key"]) == (True, 2, "key")
    body = rollout("vllm").request(asked)
    assert (body["sampling_params"]["routed_experts_prompt_start"], body["cache_salt"]) == (2, "key")


def test_without_a_key_and_routes_none_are_named():
    asked = Asked(SampleRequest((1, 2, 3), "s", 7), 5, 0, record_routes=False)
    assert not {"return_routed_experts", "routed_experts_start_len", "extra_key"} & set(
        rollout("sglang").request(asked)
    )
    body = rollout("vllm").request(asked)
    assert "cache_salt" not in body
    assert body["sampling_params"]["routed_experts_prompt_start"] == 3, "vLLM records whatever it is asked for"


PAGES = {
    "SGLang": ("sglang", json.dumps({"page_size": 64, "disable_radix_cache": False}), 64),
    "SGLang without its cache": ("sglang", json.dumps({"page_size": 64, "disable_radix_cache": True}), 0),
    "vLLM": ("vllm", METRICS, 32),
    "vLLM without its cache": ("vllm", METRICS.replace("True", "False"), 0),
}


@pytest.mark.parametrize(("name", "text", "page"), PAGES.values(), ids=PAGES)
def test_the_server_says_what_its_cache_keeps(name, text, page):
    assert asyncio.run(rollout(name).cache_page(Client(text))) == page


@pytest.mark.parametrize(("name", "text"), [("sglang", "<html>"), ("sglang", "{}"), ("sglang", "[]"), ("vllm", "")])
def test_a_server_that_does_not_say_is_refused(name, text):
    with pytest.raises(SampleError, match="does not say what the engine's cache keeps"):
        asyncio.run(rollout(name).cache_page(Client(text)))


@pytest.mark.parametrize(
    ("page", "found", "rows"),
    [(1, True, 299), (64, True, 256), (64, False, 0), (0, True, 0), (512, True, 0)],
    ids=["tokens", "pages", "not found again", "no cache", "no room for a page"],
)
def test_prompts_are_shared_where_one_was_found_again(page, found, rows, monkeypatch, caplog):
    engine = rollout("sglang")
    asked: list[SampleRequest] = []

    async def cache_page(client: Any) -> int:
        return page

    async def prime(wanted: SampleRequest) -> None:
        asked.append(wanted)

    async def ask(wanted: SampleRequest, *, max_new_tokens: int) -> Sample:
        asked.append(wanted)
        return Sample(TRAJECTORY, from_cache=found)

    monkeypatch.setattr(engine, "cache_page", cache_page)
    monkeypatch.setattr(engine, "_prime", prime)
    monkeypatch.setattr(engine, "_ask", ask)
    asyncio.run(engine._find_out_what_is_kept(Client("")))
    request = GenerateRequest((1,) * 300, ("a", "b"), (0, 1))
    assert engine._sharing.shareable_rows(request) == rows
    assert ("keeps no prompt" in caplog.text) == (not found)
    if rows:
        first, second = asked
        assert first == second
        assert len(first.prompt_ids) == first.cached_rows + 1 == first.first_row + 1 == 65
