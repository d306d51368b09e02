"""Requests to a server; sharing of prompts only if its cache was seen to keep them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling import Sampling
from roll_r3.engines.answers import Asked
from roll_r3.engines.sampling import Sample, SampleError, SampleRequest
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.engines.vllm.strategy import VllmRollout
from roll_r3.strategies.base import GenerateRequest

STRATEGIES = {"sglang": SglangRollout, "vllm": VllmRollout}
SAMPLING = Sampling(max_new_tokens=8)
TRAJECTORY = Trajectory.one_turn(
    "x", "", prompt_ids=[0], response_ids=[0], log_probs=[0.0], version=0, finish_reason="stop"
)
METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",enable_prefix_caching="True",engine="0"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 2.0
"""


def rollout(name: str, prompt_length: int = 300, **generating: Any) -> ServerRollout[Any]:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": "/models/tiny",
            "prompt_length": prompt_length,
            "response_length": 20,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": "R3"},
                "strategy_args": {"strategy_name": name},
                "generating_args": generating,
            },
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


def test_what_ends_a_response_is_named():
    asked = Asked(SampleRequest((1, 2, 3), "s", 7), 5, 0, record_routes=False, stop_strings=("</a>",))
    params = rollout("sglang", stop_token_ids=[7]).request(asked)["sampling_params"]
    assert (params["stop_token_ids"], params["stop"]) == ([7], ["</a>"])
    assert rollout("vllm", stop_token_ids=[7]).request(asked)["sampling_params"]["stop_token_ids"] == [7]


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


def server_info(page: str, off: str = "false") -> str:
    return f'{{"page_size": {page}, "disable_radix_cache": {off}}}'


LIES = [
    *[("sglang", text) for text in ("<html>", "{}", "[]", "[" * 100_000, "\x1b[2J", server_info("64", "0"))],
    *[("sglang", server_info(page)) for page in ('"64"', "Infinity", "64.0", "true", "0", "-1", "9" * 5000, "[[]]")],
    *[("vllm", METRICS.replace("32", page)) for page in ("9" * 5000, "0", "-1", "x", "", "\u0663", "\x1b[2J")],
    ("vllm", ""),
    ("vllm", METRICS.replace("True", "1")),
    ("vllm", "vllm:cache_config_info{" + "a" * 1_000_000 + "}"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("name", "text"), LIES, ids=lambda value: value[:20])
def test_a_server_that_does_not_say_is_refused(name, text):
    with pytest.raises(SampleError, match="does not say what the engine's cache keeps") as refused:
        asyncio.run(rollout(name).cache_page(Client(text)))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 4000


def test_preemptions_are_counted_over_all_of_vllm():
    assert asyncio.run(rollout("vllm").recomputed(Client(METRICS))) == 5
    assert asyncio.run(rollout("sglang").recomputed(Client(""))) == 0, "its answers say so themselves"
    assert asyncio.run(rollout("vllm").recomputed(Client(METRICS.replace("3.0", "1.25e+06")))) == 1_250_002


@pytest.mark.parametrize("count", ["1e999", "1.2.3", "1.5", "NaN", "+Inf", "-1.0", "9" * 5000, "1e+16", "e", "\x1b[2J"])
def test_what_is_no_count_of_preemptions_is_refused(count):
    with pytest.raises(SampleError, match="does not count preemptions") as refused:
        asyncio.run(rollout("vllm").recomputed(Client(METRICS.replace("3.0", count))))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 4000
    with pytest.raises(SampleError, match="does not count preemptions"):
        asyncio.run(rollout("vllm").recomputed(Client("")))


def found_out(engine: ServerRollout[Any], monkeypatch: Any, page: int, found: bool, apart: bool) -> list[SampleRequest]:
    asked: list[SampleRequest] = []

    async def cache_page(client: Any) -> int:
        if page < 0:
            raise SampleError("HTTP 404")
        return page

    async def prime(wanted: SampleRequest) -> None:
        asked.append(wanted)

    async def ask(wanted: SampleRequest, *, max_new_tokens: int) -> Sample:
        asked.append(wanted)
        return Sample(TRAJECTORY, from_cache=found and (wanted.cache_key == asked[0].cache_key or not apart))

    monkeypatch.setattr(engine, "cache_page", cache_page)
    monkeypatch.setattr(engine, "_prime", prime)
    monkeypatch.setattr(engine, "_ask", ask)
    asyncio.run(engine._find_out_what_is_kept(Client("")))
    return asked


OUTCOMES = {
    "tokens": (1, True, True, 299, ""),
    "pages": (64, True, True, 256, ""),
    "not found again": (64, False, True, 0, "keeps no prompt of 65 tokens"),
    "keys mean nothing": (64, True, False, 0, "finds a prompt under another key"),
    "no cache": (0, True, True, 0, "prefix cache is off"),
    "no prompt fills a page": (512, True, True, 0, ""),
    "does not say": (-1, True, True, 0, "HTTP 404"),
}


@pytest.mark.parametrize(("page", "found", "apart", "rows", "said"), OUTCOMES.values(), ids=OUTCOMES)
def test_prompts_are_shared_where_one_was_found_again(page, found, apart, rows, said, monkeypatch, caplog):
    engine = rollout("sglang")
    asked = found_out(engine, monkeypatch, page, found, apart)
    request = GenerateRequest((1,) * 300, ("a", "b"), (0, 1), "group", SAMPLING, record_routes=True)
    assert engine._sharing.shareable_rows(request) == rows
    assert said in caplog.text and bool(said) == bool(caplog.text), "the engine starts, and says why it shares nothing"
    if rows:
        first, second, third = asked
        assert first == second
        assert replace(third, cache_key=first.cache_key) == first != third
        assert len(first.prompt_ids) == first.cached_rows + 1 == first.first_row + 1 == 65


def test_where_no_prompt_is_long_enough_nothing_is_tried(monkeypatch, caplog):
    assert found_out(rollout("sglang", prompt_length=64), monkeypatch, 1, True, True) == []
    assert not caplog.text
    assert len(found_out(rollout("sglang", prompt_length=65), monkeypatch, 1, True, True)) == 3
