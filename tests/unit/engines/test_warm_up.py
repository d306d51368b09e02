"""Requests to a server; sharing of prompts only if its cache was seen to keep them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, cast

import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import EngineRole, engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.parts import Parts
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.sampler import Sampler
from roll_r3.engines.sglang.codec import SglangCodec
from roll_r3.engines.sglang.strategy import SglangStatus
from roll_r3.engines.startup import WarmUp
from roll_r3.engines.vllm.codec import VllmCodec
from roll_r3.engines.vllm.strategy import VllmStatus
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.base import GenerateRequest

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


def role(name: str, prompt_length: int = 300) -> EngineRole:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": "/models/tiny",
            "prompt_length": prompt_length,
            "response_length": 20,
            "actor_train": {},
            "actor_infer": {"router_replay": {"mode": "R3"}, "strategy_args": {"strategy_name": name}},
        }
    )
    return engine_role(config)


class Client:
    def __init__(self, text: str) -> None:
        self.text = text

    async def get(self, path: str, timeout_s: float) -> bytes:
        return self.text.encode()


CODECS = {"sglang": SglangCodec(), "vllm": VllmCodec("", trust_remote_code=False)}
STATUS = {"sglang": SglangStatus(), "vllm": VllmStatus()}
WHOLE = SampleRequest(
    (1, 2, 3), "s", 7, Sampling(5, 0.5, 0.9, 20, (7,), ("</a>",)), "g", first_row=2, cached_rows=2, cache_key="key"
)
PLAIN = SampleRequest((1, 2, 3), "s", 7, Sampling(5), record_routes=False)
REQUESTS = {
    "SGLang, all settings": (
        "sglang",
        WHOLE,
        '{"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, '
        '"top_k": 20, "sampling_seed": 7, "skip_special_tokens": false, "stop_token_ids": [7], "stop": ["</a>"]}, '
        '"return_logprob": true, "return_routed_experts": true, "routed_experts_start_len": 2, "extra_key": "key"}',
    ),
    "SGLang, without routes": (
        "sglang",
        PLAIN,
        '{"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, '
        '"top_k": -1, "sampling_seed": 7, "skip_special_tokens": false}, "return_logprob": true}',
    ),
    "vLLM, all settings": (
        "vllm",
        WHOLE,
        '{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 20, '
        '"seed": 7, "logprobs": 0, "detokenize": false, "routed_experts_prompt_start": 2, "stop_token_ids": [7]}, '
        '"cache_salt": "key"}',
    ),
    "vLLM, without routes (it records whatever it is asked for)": (
        "vllm",
        PLAIN,
        '{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": -1, '
        '"seed": 7, "logprobs": 0, "detokenize": false, "routed_experts_prompt_start": 3}}',
    ),
}


@pytest.mark.parametrize(("name", "wanted", "body"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_has_its_own_settings(name, wanted, body):
    assert json.dumps(CODECS[name].request(Asked(wanted, 0))) == body


PAGES = {
    "SGLang": ("sglang", json.dumps({"page_size": 64, "disable_radix_cache": False}), 64),
    "SGLang without its cache": ("sglang", json.dumps({"page_size": 64, "disable_radix_cache": True}), 0),
    "vLLM": ("vllm", METRICS, 32),
    "vLLM without its cache": ("vllm", METRICS.replace("True", "False"), 0),
}


@pytest.mark.parametrize(("name", "text", "page"), PAGES.values(), ids=PAGES)
def test_the_server_says_what_its_cache_keeps(name, text, page):
    assert asyncio.run(STATUS[name].cache_page(Client(text))) == page


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
    with pytest.raises(SampleError, match="does not describe the engine's cache") as refused:
        asyncio.run(STATUS[name].cache_page(Client(text)))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 4000


def test_preemptions_are_counted_over_all_of_vllm():
    assert asyncio.run(STATUS["vllm"].recomputed(Client(METRICS))) == 5
    assert asyncio.run(STATUS["sglang"].recomputed(Client(""))) == 0, "its answers say so themselves"
    assert asyncio.run(STATUS["vllm"].recomputed(Client(METRICS.replace("3.0", "1.25e+06")))) == 1_250_002


@pytest.mark.parametrize("count", ["1e999", "1.2.3", "1.5", "NaN", "+Inf", "-1.0", "9" * 5000, "1e+16", "e", "\x1b[2J"])
def test_what_is_no_count_of_preemptions_is_refused(count):
    with pytest.raises(SampleError, match="does not count preemptions") as refused:
        asyncio.run(STATUS["vllm"].recomputed(Client(METRICS.replace("3.0", count))))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 4000
    with pytest.raises(SampleError, match="does not count preemptions"):
        asyncio.run(STATUS["vllm"].recomputed(Client("")))


class Server:
    """Stands in for a codec, the status and the client of a server with such a prefix cache."""

    path = "/generate"

    def __init__(self, page: int, found: bool, apart: bool) -> None:
        self.page, self.found, self.apart = page, found, apart
        self.asked: list[SampleRequest] = []

    def load(self) -> None: ...

    async def prepare(self, client: Any) -> None: ...

    async def recomputed(self, client: Any) -> int:
        return 0

    async def cache_page(self, client: Any) -> int:
        if self.page < 0:
            raise SampleError("HTTP 404")
        return self.page

    def kept_limit(self, asked: Asked) -> int:
        return 0

    def request(self, asked: Asked) -> dict[str, Any]:
        return {"wanted": asked.sample}

    async def post(self, path: str, request: dict[str, Any], timeout_s: float, most_bytes: int) -> Any:
        self.asked.append(request["wanted"])
        return request["wanted"]

    def read(self, body: Any, asked: Asked, facts: ModelFacts) -> Sample:
        return Sample(TRAJECTORY, from_cache=self.found and (body.cache_key == "warm-up" or not self.apart))


class Health:
    def require_running(self) -> None: ...

    async def until_exit(self, work: Any) -> Any:
        return await work


def warmed_up(server: Any, prompt_length: int = 300) -> Sampler:
    """A sampler after the warm-up; the first request is the checked sample, the others probe the cache."""
    settings, health = SglangConfig(), cast("Any", Health())
    parts = Parts(cast("Any", None), server, server, settings)
    sampler = Sampler(parts, server, ModelFacts("test", 1, (0,), 4, 2, 1, 1, 260, 64), health, running_requests=8)
    asyncio.run(WarmUp(parts, server, sampler, health, "engine 0").run(role("sglang", prompt_length), 7))
    return sampler


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
def test_prompts_are_shared_where_one_was_found_again(page, found, apart, rows, said, caplog):
    server = Server(page, found, apart)
    sampler = warmed_up(server)
    asked = server.asked[1:]
    request = GenerateRequest((1,) * 300, ("a", "b"), (0, 1), "group", SAMPLING, record_routes=True)
    assert sampler.sharing.shareable_rows(request) == rows
    assert said in caplog.text and bool(said) == bool(caplog.text), "the engine starts, and says why it shares nothing"
    if rows:
        first, second, third = asked
        assert replace(first, record_routes=True) == second and not first.record_routes
        assert replace(third, cache_key=first.cache_key) == second != third
        assert len(first.prompt_ids) == first.cached_rows + 1 == first.first_row + 1 == 65


def test_where_no_prompt_is_long_enough_nothing_is_tried(caplog):
    server = Server(1, True, True)
    warmed_up(server, prompt_length=64)
    assert [(len(one.prompt_ids), one.sampling.max_new_tokens) for one in server.asked] == [(4, 2)]
    assert not caplog.text
    server = Server(1, True, True)
    warmed_up(server, prompt_length=65)
    assert len(server.asked) == 4
