"""Real SGLang server at fp32: its log-probabilities and routes equal those of transformers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch.distributed as dist
from distributed import Gang
from kept_cases import BY_TOP_K, BY_TOP_P, assert_sets_are_what_was_sampled_from, assert_trainers_agree
from reward_processes import asked
from rollout_cases import (
    RESPONSE_LENGTH,
    STOPS,
    Evicting,
    Reference,
    Sent,
    assert_likeliest,
    assert_stopped_where_asked,
    evaluate,
    generate,
    group_members,
    long_requests,
    one_by_one,
    one_group,
    requests,
    trajectories,
)
from safetensors.torch import load_file
from sglang_cases import Engine, configuration

from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rewards import JudgeConfig, RewardConfig
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.engines.sglang.weights import SglangWeightChannel
from roll_r3.errors import ConfigError, EngineError
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.rewards.scoring import Rewards
from roll_r3.strategies.base import EnginePlace, GenerateRequest, GenerateResult

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

TEMPERATURE = 0.8
END = 258
"""End-of-sequence token of the tiny tokenizer."""


@pytest.fixture(scope="module")
def old_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("old"), seed=0)


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def engine(old_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = configuration(
        old_weights, "float32", temperature=TEMPERATURE, prompt_length=1000, max_total_tokens=2048, max_retries=1
    ).model_copy(update={"fp32_lm_head": True})  # no number changes in fp32, but SGLang computes logits by another path
    engine = Engine(config, tmp_path_factory.mktemp("log") / "server.log")
    try:
        engine.run(engine.rollout.start())
        yield engine
    finally:
        engine.close()


def assert_equals_transformers(engine: Engine, checkpoint: Path, version: int) -> None:
    asked = [*requests(6, 3), *long_requests(1, 2)]
    assert_is_what_the_model_computes(asked, engine.generate(asked), checkpoint, version)


def assert_is_what_the_model_computes(
    asked: Sequence[GenerateRequest], results: Sequence[GenerateResult], checkpoint: Path, version: int = 0
) -> None:
    reference = Reference(checkpoint, TEMPERATURE)
    for request, result in zip(asked, results, strict=True):
        assert not result.dropped
        assert tuple(t.sample_id for t in result.trajectories) == request.sample_ids
        for t in result.trajectories:
            log_probs_R, ids_MRK = reference.log_probs_and_routes(t)
            assert tuple(t.prompt_ids) == request.prompt_ids
            assert t.weight_versions == (version,)
            np.testing.assert_array_equal(t.routes.ids_MRK, ids_MRK)
            np.testing.assert_allclose(t.log_probs, log_probs_R, atol=1e-4, rtol=0)
            stopped = END in t.response_ids
            assert t.finish_reason == ("stop" if stopped else "length")
            assert t.response_ids.tolist().index(END) == len(t.response_ids) - 1 if stopped else True
            assert stopped or len(t.response_ids) == RESPONSE_LENGTH


def send(channel: SglangWeightChannel, checkpoint: Path, version: int) -> None:
    tensors = list(load_file(checkpoint / "model.safetensors").items())
    channel.begin(version)
    for start in range(0, len(tensors), 100):
        channel.send(tensors[start : start + 100])
    channel.end()


def test_routes_and_log_probs_are_those_of_transformers(engine: Engine, old_weights: Path) -> None:
    assert_equals_transformers(engine, old_weights, version=0)


def test_samples_of_a_prompt_differ_and_a_prefix_hit_changes_nothing(engine: Engine) -> None:
    asked = requests(2, 8, first_seed=900)
    first, second = trajectories(engine.generate(asked)), trajectories(engine.generate(asked))
    assert len({t.response_ids.tobytes() for t in first.values()}) == 16
    for sample_id, t in first.items():
        np.testing.assert_array_equal(t.response_ids, second[sample_id].response_ids)
        np.testing.assert_array_equal(t.routes.ids_MRK, second[sample_id].routes.ids_MRK)


def test_a_prompts_rows_are_fetched_once_and_are_those_of_every_sample(engine: Engine, old_weights: Path) -> None:
    """Use two prompts with a common beginning; samples and rows are as if each were requested alone."""
    asked = [*long_requests(1, 4), *long_requests(2, 4, length=151, common=100)]
    with Sent(engine.rollout) as sent:
        results = engine.generate(asked)
    assert [result.retries for result in results] == [0, 0, 0]
    starts = [request.get("routed_experts_start_len", -1) for request in sent.requests]
    assert sorted(starts) == [-1] * 3 + [0] * 3 + [149] * 3 + [150] * 6, "a first request, a leader, three others each"
    assert_is_what_the_model_computes(asked, results, old_weights)
    with Sent(engine.rollout) as sent_alone:
        alone = engine.generate(one_by_one(asked))
    for t, same in zip(trajectories(results).values(), trajectories(alone).values(), strict=True):
        np.testing.assert_array_equal(t.response_ids, same.response_ids)
        np.testing.assert_array_equal(t.routes.ids_MRK, same.routes.ids_MRK)
    assert sum(sent.num_bytes) < 0.5 * sum(sent_alone.num_bytes)


def test_samples_whose_prompt_left_the_cache_are_asked_for_again(
    engine: Engine, old_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = engine.rollout._sampler
    evicting = Evicting(sampler, long_requests(16, length=149))
    monkeypatch.setattr(sampler, "sharing", evicting)
    asked = long_requests(1, 4)
    results = engine.generate(asked)
    assert results[0].retries >= 3
    assert_is_what_the_model_computes(asked, results, old_weights)
    assert evicting.shareable_rows(asked[0]) == 0, "nothing is shared for a while"


def test_an_evaluation_takes_the_likeliest_tokens_and_leaves_training_as_it_was(
    engine: Engine, old_weights: Path
) -> None:
    asked = requests(4, 2)
    before = trajectories(engine.generate(asked))
    assert_likeliest(engine.run(evaluate(engine.rollout, asked, greedy=True)), Reference(old_weights), 1e-3)
    for sample_id, t in trajectories(engine.generate(asked)).items():
        assert t.response_ids.tobytes() == before[sample_id].response_ids.tobytes()


def test_stop_tokens_and_stop_strings_end_a_response(engine: Engine, old_weights: Path) -> None:
    assert_stopped_where_asked(engine.generate(requests(6, 8), **STOPS), old_weights)


def test_kept_tokens_come_back_and_the_trainers_take_their_log_probs_over_them(
    engine: Engine, old_weights: Path, gang: Callable[[int], Gang]
) -> None:
    """With requests for the whole distribution in the same batches, prompts with shared rows, and routes."""
    asked = [*requests(6, 4), *long_requests(1, 4)]

    async def all_at_once() -> list[list[GenerateResult]]:
        sets = [generate(engine.rollout, asked, **sampling) for sampling in (BY_TOP_K, BY_TOP_P)]
        return await asyncio.gather(*sets, generate(engine.rollout, requests(4, 2)))

    by_top_k, by_top_p, whole = engine.run(all_at_once())
    assert_sets_are_what_was_sampled_from(by_top_k, old_weights, BY_TOP_K)
    assert_sets_are_what_was_sampled_from(by_top_p, old_weights, BY_TOP_P)
    assert_trainers_agree([*by_top_k, *by_top_p], old_weights, gang)
    assert_is_what_the_model_computes(requests(4, 2), whole, old_weights)
    assert all(t.kept is None for t in trajectories(whole).values())
    greedy = trajectories(engine.generate(requests(2, 2), top_k=1, return_kept=True)).values()
    assert all(not t.log_probs.any() and t.kept.ids_J.tolist() == t.response_ids.tolist() for t in greedy)


def test_a_request_that_cannot_be_served_is_dropped_with_the_servers_words(engine: Engine) -> None:
    too_long = one_group(tuple([7] * 1600), ("long",), (1,))
    bad, good = engine.generate([too_long, requests(1, 2)[0]])
    assert bad.trajectories == ()
    assert "long" in bad.dropped
    assert "400" in bad.dropped["long"]
    assert bad.retries == 1
    assert len(good.trajectories) == 2


async def requests_of_server(engine: Engine, *states: str) -> int:
    """Return the number of requests in these states of the scheduler."""
    answer = json.loads(await engine.rollout._client.get("/v1/loads", 10.0))
    return sum(load[f"num_{state}_reqs"] for load in answer["loads"] for state in states)


async def seconds_until(condition: Callable[[], Awaitable[bool]]) -> float:
    start = time.monotonic()
    while not await condition():
        await asyncio.sleep(0.05)
    return time.monotonic() - start


def test_aborted_requests_leave_the_server_at_once_and_later_ones_are_exact(engine: Engine, old_weights: Path) -> None:
    """SGLang by itself looks for closed connections of queued requests every 4 seconds."""

    async def aborted() -> float:
        task = asyncio.create_task(generate(engine.rollout, long_requests(24, 2), max_new_tokens=800))

        async def full() -> bool:
            return await requests_of_server(engine, "waiting") > 0

        async def idle() -> bool:
            return not await requests_of_server(engine, "waiting", "running")

        await seconds_until(full)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await seconds_until(idle)

    assert engine.run(aborted(), 60) < 2.0
    slots = engine.rollout._sampler._slots
    assert slots.free == slots.total
    assert_equals_transformers(engine, old_weights, version=0)


def test_with_nothing_to_do_it_leaves_the_cores_to_others(engine: Engine) -> None:
    """Check an idle server: the trainer needs the cores."""
    engine.generate(requests(1, 2))
    members = group_members(engine.rollout._process)

    def seconds() -> float:
        return sum(sum(member.cpu_times()[:2]) for member in members)

    time.sleep(1)
    before = seconds()
    time.sleep(4)
    assert seconds() - before < 1.0, "a scheduler that looks for requests without a pause takes all of a core"


def test_nobody_gets_in_without_the_key(engine: Engine) -> None:
    target = engine.rollout.weight_target()

    async def statuses() -> list[int]:
        found = []
        async with aiohttp.ClientSession() as session:
            for path in ("/generate", "/begin_weight_update", "/flush_cache", "/update_weights_from_distributed"):
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    url = f"http://{target.host}:{target.port}{path}"
                    async with session.post(url, json={}, headers=headers) as response:
                        found.append(response.status)
        return found

    assert engine.run(statuses()) == [401] * 8


def test_the_key_shows_nowhere(engine: Engine) -> None:
    key = engine.rollout.weight_target().api_key
    listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "launcher.py" in listing
    assert key not in listing
    log = engine.log_path.read_text()
    assert "'api_key': '<hidden>'" in log
    assert key not in log
    assert key not in repr(engine.rollout.weight_target()) + repr(engine.rollout)


def test_the_engine_judges_by_openais_api(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random model answers: noise, mostly without a verdict."""
    server = engine.rollout._client
    monkeypatch.setenv("ENGINE_KEY", engine.rollout._key)
    judge = JudgeConfig(
        base_url=f"{server._base}/v1",
        model="default",
        api_key_env="ENGINE_KEY",
        prompt="{prompt}{response}={ground_truth}?",
        max_tokens=8,
        max_concurrency=3,
        retries=0,
    )
    responses = [asked(str(i), str(i), prompt="1+1=") for i in range(6)]
    with Rewards({"a": RewardConfig(reward="llm_judge", judge=judge)}, 1, 0.0, tmp_path) as rewards:
        answers = rewards.begin(responses).result()
        assert all(answer.score is not None for answer in answers), answers
        assert [answer.undecided for answer in answers] == [" gave the verdict " in a.why for a in answers]
        monkeypatch.setattr(rewards._judges._clients[0], "_judge", judge.model_copy(update={"max_tokens": -1}))
        (refused,) = rewards.begin(responses[:1]).result()
        assert refused.why.startswith("rewards.a (llm_judge) gave no verdict: the server answered 4")
    monkeypatch.setenv("ENGINE_KEY", "wrong")
    with Rewards({"a": RewardConfig(reward="llm_judge", judge=judge)}, 1, 1.0, tmp_path) as rewards:
        (refused,) = rewards.begin(responses[:1]).result()
        assert (refused.score, "the server answered 401" in refused.why) == (None, True)


def test_new_weights_arrive_and_stale_answers_are_refused(engine: Engine, old_weights: Path, new_weights: Path) -> None:
    """Send from a process with a default group, like a trainer."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    channel = SglangWeightChannel([engine.rollout.weight_target()], device="cpu", timeout_s=60.0)
    try:
        send(channel, new_weights, version=1)
        (stale,) = engine.generate(requests(1, 1))
        assert "version 1, not 0" in stale.dropped["p0/s0"]
        engine.run(engine.rollout.on_weights_updated(1))
        assert_equals_transformers(engine, new_weights, version=1)
        send(channel, old_weights, version=2)
        engine.run(engine.rollout.on_weights_updated(2))
        assert_equals_transformers(engine, old_weights, version=2)
    finally:
        channel.close()
        dist.destroy_process_group()


def test_answers_from_half_written_weights_are_refused(engine: Engine, new_weights: Path) -> None:
    """Run late: nothing can be sampled from this engine afterwards."""
    channel = SglangWeightChannel([engine.rollout.weight_target()], device="cpu", timeout_s=60.0)
    tensors = load_file(new_weights / "model.safetensors")
    try:
        channel.begin(3)
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        with pytest.raises(EngineError, match=r"engine 0 \(SGLang\) refused /update_weights_from_distributed"):
            channel.send([(name, tensors[name][:5, :5])])  # a shape that the server cannot load
        (result,) = engine.generate(requests(1, 1))
        assert "3-incomplete" in result.dropped["p0/s0"]
        with pytest.raises(EngineError, match="earlier weight update failed"):
            channel.begin(4)
    finally:
        channel.close()


def test_stop_leaves_nothing(engine: Engine) -> None:
    """Last test of this engine."""
    assert len(group_members(engine.rollout._process)) >= 3
    engine.run(engine.rollout.stop())
    assert group_members(engine.rollout._process) == []
    engine.run(engine.rollout.stop())
    with pytest.raises(EngineError, match="not running"):
        engine.generate(requests(1, 1))


def try_to_start(config: RLVRConfig, tmp_path: Path) -> None:
    log_path = tmp_path / "server.log"
    asyncio.run(SglangRollout(engine_role(config), EnginePlace(0, "cpu", (), log_path)).start())


def test_refused_server_args_stop_the_start(old_weights: Path, tmp_path: Path) -> None:
    config = configuration(old_weights, "float32", server_args={"pp_size": 2})
    with pytest.raises(ConfigError, match=r"server_args\.pp_size: pipeline stages"):
        try_to_start(config, tmp_path)


def test_an_interpreter_without_sglang_is_named(old_weights: Path, tmp_path: Path) -> None:
    bare = "/usr/bin/python3"
    if not Path(bare).exists():
        pytest.skip("no second interpreter on this machine")
    with pytest.raises(EngineError, match=f"{bare} has no SGLang"):
        try_to_start(configuration(old_weights, "float32", python=bare), tmp_path)
    with pytest.raises(EngineError, match=r"cannot run strategy_config\.python"):
        try_to_start(configuration(old_weights, "float32", python="/no/such/python"), tmp_path)


def test_a_server_that_cannot_start_shows_its_log(old_weights: Path, tmp_path: Path) -> None:
    config = configuration(old_weights, "float32", server_args={"no_such_argument": 1})
    with pytest.raises(EngineError, match=r"did not start: .* exited with code 2; .*(?s:.*)no-such-argument"):
        try_to_start(config, tmp_path)
