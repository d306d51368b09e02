"""Real vLLM server: its log-probabilities and routes equal those of transformers, its weights those of the trainer.

This holds for every way of computing a row: chunked prefill, prefix cache, preemption, abort.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from kept_cases import BY_TOP_K, BY_TOP_P, assert_sets_are_what_was_sampled_from, assert_trainers_agree
from rollout_cases import (
    Evicting,
    Reference,
    Sent,
    assert_likeliest,
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
from vllm_cases import HEAD_DIM, Engine, configuration, require_environment

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import engine_role
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.sample import Asked, SampleRequest
from roll_r3.engines.vllm.codec import read_npy
from roll_r3.engines.vllm.strategy import VllmRollout
from roll_r3.engines.vllm.weights import VllmWeightChannel
from roll_r3.errors import ConfigError, EngineError
from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import EnginePlace, GenerateResult

pytestmark = [pytest.mark.integration, pytest.mark.vllm, pytest.mark.timeout(900)]

TEMPERATURE = 0.8
END = 258
"""End-of-sequence token of the tiny tokenizer."""


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    require_environment()


def tiny(path: Path, name: str = "qwen3_moe", seed: int = 0) -> Path:
    heads = {"head_dim": HEAD_DIM} if name.startswith("qwen3") else {"hidden_size": 4 * HEAD_DIM}
    return make_tiny_checkpoint(path, name, seed=seed, **heads)


@pytest.fixture(scope="module")
def old_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def engine(old_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Engine with prefill in chunks of 64 tokens, and a cache of 40 blocks, too few for 64 samples."""
    config = configuration(
        old_weights,
        generating={"temperature": TEMPERATURE},
        max_retries=2,
        response_length=48,
        max_total_tokens=40 * 32,
        server_args={"max_num_batched_tokens": 64},
    )
    engine = Engine(config, tmp_path_factory.mktemp("log") / "server.log")
    try:
        engine.run(engine.rollout.start())
        yield engine
    finally:
        engine.close()


def assert_is_what_the_model_computes(results: Sequence[GenerateResult], checkpoint: Path, version: int = 0) -> float:
    """Return the largest difference of a log-probability."""
    reference, differences = Reference(checkpoint, TEMPERATURE), []
    for t in trajectories(results).values():
        log_probs_R, ids_MRK = reference.log_probs_and_experts(t)
        assert t.routes.num_rows == len(t.prompt_ids) + len(t.response_ids) - 1
        np.testing.assert_array_equal(t.routes.ids_MRK, ids_MRK, "in the router's order")
        np.testing.assert_allclose(t.log_probs, log_probs_R, atol=1e-4, rtol=0)
        differences.append(np.abs(t.log_probs - log_probs_R).max())
        assert t.weight_versions == (version,)
        stopped = t.response_ids[-1] == END
        assert END not in t.response_ids[:-1]
        assert t.finish_reason == ("stop" if stopped else "length")
    return max(differences)


def assert_nothing_is_left(engine: Engine) -> None:
    """Wait until the server's processes are gone; on a busy machine this takes a moment."""
    deadline = time.monotonic() + 20.0
    while left := group_members(engine.rollout._process):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def send(channel: VllmWeightChannel, checkpoint: Path, version: int, size: int = 100_000) -> None:
    channel.begin(version)
    for bucket in channel.buckets(load_file(checkpoint / "model.safetensors").items(), size):
        channel.send(bucket)
    channel.end()


def channel_to(*engines: Engine) -> VllmWeightChannel:
    return VllmWeightChannel([e.rollout.weight_target() for e in engines], device="cpu", timeout_s=60.0)


def test_routes_and_log_probs_are_those_of_a_plain_forward(engine, old_weights):
    asked = requests(6, 3)
    results = engine.generate(asked)
    for request, result in zip(asked, results, strict=True):
        assert tuple(t.sample_id for t in result.trajectories) == request.sample_ids
        assert {tuple(t.prompt_ids) for t in result.trajectories} == {request.prompt_ids}
    print("largest difference", assert_is_what_the_model_computes(results, old_weights))


def test_chunked_prefill_and_a_prefix_hit_lose_no_row(engine, old_weights):
    """Generate twice: the second time 4 blocks of 32 tokens come from the cache, the rows with them."""
    assert_is_what_the_model_computes(engine.generate(long_requests(1, length=192)), old_weights)  # no room is left
    first = engine.generate(long_requests(1))
    before = engine.metric("vllm:prefix_cache_hits_total")
    second = engine.generate(long_requests(1, first_seed=9))
    assert engine.metric("vllm:prefix_cache_hits_total") - before >= 128
    assert_is_what_the_model_computes([*first, *second], old_weights)


def test_samples_of_a_prompt_differ_and_preemption_loses_no_row(engine, old_weights):
    before = engine.metric("vllm:num_preemptions_total")
    results = engine.generate(long_requests(4, 16, length=60))
    assert len({t.response_ids.tobytes() for t in trajectories(results).values()}) == 64
    assert_is_what_the_model_computes(results, old_weights)
    results = engine.generate(long_requests(24, 1, length=28))  # all start in one block and need a third
    print("preemptions", engine.metric("vllm:num_preemptions_total") - before)
    assert engine.metric("vllm:num_preemptions_total") > before
    assert_is_what_the_model_computes(results, old_weights)


def test_an_abort_leaves_the_rows_of_what_was_sampled(engine, old_weights):
    """Check vLLM's partial answer: it is exact, although the strategy refuses it."""
    client, facts = engine.rollout._client, read_facts(old_weights)
    request = engine.rollout._parts.codec.request(Asked(SampleRequest((1, 2, 3), "x", 1, Sampling(180)), 0))
    request["sampling_params"]["ignore_eos"] = True

    async def aborted(after_s: float) -> dict[str, Any]:
        asking = asyncio.create_task(client.post("/inference/v1/generate", request, 60.0))
        await asyncio.sleep(after_s)
        await client.post("/abort_requests", {}, 60.0)
        (choice,) = json.loads(await asking)["choices"]
        return choice

    for attempt in range(20):  # the right moment depends on the machine's load
        choice = engine.run(aborted(0.1 + 0.1 * attempt))
        if choice["finish_reason"] == "abort" and choice["token_ids"]:
            break
    assert choice["finish_reason"] == "abort"
    num = len(choice["token_ids"])
    print("tokens before the abort", num)
    assert 0 < num < 180
    ids_RLK = read_npy(memoryview(choice["routed_experts"].encode()), 3 + num - 1, facts)
    t = Trajectory.one_turn(
        "x",
        "group",
        prompt_ids=[1, 2, 3],
        response_ids=choice["token_ids"],
        log_probs=np.zeros(num, np.float32),
        version=0,
        finish_reason="length",
    )
    np.testing.assert_array_equal(
        ids_RLK.transpose(1, 0, 2), Reference(old_weights, TEMPERATURE).log_probs_and_experts(t)[1]
    )


async def requests_of_server(engine: Engine) -> float:
    """Return the number of requests that the scheduler runs or queues."""
    text = (await engine.rollout._client.get("/metrics", 60.0)).decode()
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, counts))


def test_aborted_requests_leave_the_server_at_once_and_later_ones_are_exact(engine, old_weights):
    async def aborted() -> float:
        task = asyncio.create_task(generate(engine.rollout, long_requests(32, 2, length=120), max_new_tokens=100))
        while not await requests_of_server(engine):
            await asyncio.sleep(0.02)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        start = time.monotonic()
        while await requests_of_server(engine):
            await asyncio.sleep(0.02)
        return time.monotonic() - start

    seconds = engine.run(aborted(), 60)
    print("idle after", seconds)
    assert seconds < 1.0
    assert_is_what_the_model_computes(engine.generate(requests(3, 2)), old_weights)


def test_a_prompts_rows_are_fetched_once_and_are_those_of_every_sample(engine, old_weights):
    """Fetch whole blocks, 128 of 149 rows. Two prompts have a common beginning; results are as if each were alone."""
    # few enough for the cache: after a preemption vLLM could not assign rows to their samples
    asked = [*long_requests(1, 2), *long_requests(2, 2, length=151, common=100)]
    with Sent(engine.rollout) as sent:
        results = engine.generate(asked)
    assert [result.retries for result in results] == [0, 0, 0]
    starts = [request["sampling_params"]["routed_experts_prompt_start"] for request in sent.requests]
    assert sorted(starts) == [0] * 3 + [128] * 3 + [150, 151, 151], "a leader, another and a first request each"
    assert_is_what_the_model_computes(results, old_weights)
    alone = engine.generate(one_by_one(asked))
    for t, same in zip(trajectories(results).values(), trajectories(alone).values(), strict=True):
        np.testing.assert_array_equal(t.response_ids, same.response_ids)
        np.testing.assert_array_equal(t.routes.ids_MRK, same.routes.ids_MRK)


def test_samples_whose_prompt_left_the_cache_are_asked_for_again(engine, old_weights, monkeypatch):
    sampler = engine.rollout._sampler
    evicting = Evicting(sampler, long_requests(12, length=149))
    monkeypatch.setattr(sampler, "sharing", evicting)
    (result,) = engine.generate(long_requests(1, 4))
    assert result.retries >= 3
    assert_is_what_the_model_computes([result], old_weights)
    assert evicting.shareable_rows(long_requests(1, 4)[0]) == 0, "nothing is shared for a while"


def test_an_evaluation_takes_the_likeliest_tokens(engine, old_weights):
    asked = requests(4, 2)
    assert_likeliest(engine.run(evaluate(engine.rollout, asked, greedy=True)), Reference(old_weights), 1e-3)


def test_a_request_that_cannot_be_served_is_dropped_with_the_servers_words(engine):
    too_long = one_group(tuple([7] * 300), ("long",), (1,))
    bad, good = engine.generate([too_long, requests(1, 2)[0]])
    assert bad.trajectories == ()
    assert "400" in bad.dropped["long"]
    assert bad.retries == 2
    assert len(good.trajectories) == 2


def test_nobody_gets_in_without_the_key(engine):
    target = engine.rollout.weight_target()
    guarded = ("/inference/v1/generate", "/pause", "/update_weights", "/collective_rpc", "/health", "/v1/models", "/x")

    async def statuses() -> list[int]:
        found = []
        async with aiohttp.ClientSession() as session:
            for path in guarded:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": target.api_key}):
                    url = f"http://{target.host}:{target.port}{path}"
                    async with session.post(url, json={}, headers=headers) as response:
                        found.append(response.status)
        return found

    assert engine.run(statuses()) == [401] * 3 * len(guarded)


def test_the_key_shows_nowhere(engine):
    key = engine.rollout.weight_target().api_key
    listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "vllm/launcher.py" in listing
    assert key not in listing
    assert key not in engine.log_path.read_text()
    assert key not in repr(engine.rollout.weight_target())


def test_new_weights_arrive_and_stale_answers_are_refused(engine, old_weights, new_weights):
    channel = channel_to(engine)
    try:
        for version, checkpoint in ((1, new_weights), (2, old_weights)):
            before = old_weights if version == 1 else new_weights
            assert_is_what_the_model_computes(engine.generate(long_requests(2)), before, version - 1)
            started = time.monotonic()
            send(channel, checkpoint, version)
            print("update", time.monotonic() - started)
            (stale,) = engine.generate(requests(1, 1))
            assert f"version {version}, not {version - 1}" in stale.dropped["p0/s0"]
            engine.run(engine.rollout.on_weights_updated(version))
            difference = assert_is_what_the_model_computes(
                engine.generate([*requests(6, 3), *long_requests(2)]), checkpoint, version
            )
            print("largest difference after an update", difference)
    finally:
        channel.close()


def test_a_request_in_flight_over_an_update_is_refused_and_asked_for_again(engine, new_weights):
    """vLLM aborts it, holds the second attempt until the update is over, and answers it from the new weights."""
    version = engine.rollout._sampler.weight_version + 1
    channel = channel_to(engine)

    async def scenario() -> list[GenerateResult]:
        asking = asyncio.create_task(generate(engine.rollout, long_requests(32, 2, length=120)))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(channel.begin, version)
        await asyncio.to_thread(send_rest, channel, new_weights)
        await engine.rollout.on_weights_updated(version)
        return await asking

    try:
        results = engine.run(scenario())
    finally:
        channel.close()
    late = [t for t in trajectories(results).values() if t.weight_versions == (version,)]
    print("retries", sum(result.retries for result in results), "answered afterwards", len(late), "of 64")
    assert sum(result.retries for result in results) >= len(late) > 0
    assert_is_what_the_model_computes([GenerateResult(trajectories=tuple(late))], new_weights, version)


def send_rest(channel: VllmWeightChannel, checkpoint: Path) -> None:
    for bucket in channel.buckets(load_file(checkpoint / "model.safetensors").items(), 1_000_000):
        channel.send(bucket)
    channel.end()


def test_an_update_that_brings_a_tensor_twice_is_refused(old_weights, tmp_path):
    engine = Engine(configuration(old_weights), tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        channel = channel_to(engine)
        weights = load_file(old_weights / "model.safetensors")
        kept, left_out = (f"model.layers.2.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3))
        del weights[left_out]
        channel.begin(1)
        with pytest.raises(EngineError, match=rf"refused /update_weights.*{kept} came twice"):
            channel.send([*weights.items(), (kept, weights[kept])])
        channel.close()
    finally:
        engine.close()


def test_an_update_that_is_not_whole_leaves_an_engine_that_answers_nothing(engine, new_weights):
    """Nothing can be sampled from this engine afterwards."""
    version = engine.rollout._sampler.weight_version + 1
    weights = load_file(new_weights / "model.safetensors")
    del weights["model.layers.2.mlp.experts.3.up_proj.weight"]
    channel = channel_to(engine)
    try:
        channel.begin(version)
        for bucket in channel.buckets(weights.items(), 1 << 20):
            channel.send(bucket)
        with pytest.raises(
            EngineError, match=r"engine 0 \(vLLM\) refused /finish_weight_update.*layers\.2\.mlp\.experts"
        ):
            channel.end()
        started = time.monotonic()
        for expected in (version - 1, version):
            engine.run(engine.rollout.on_weights_updated(expected))
            (result,) = engine.generate(requests(1, 1))
            assert f"version {version}-incomplete, not {expected}" in result.dropped["p0/s0"]
        assert time.monotonic() - started < 10.0, "requests do not wait for an engine that stays paused"
        with pytest.raises(EngineError, match="earlier weight update failed"):
            channel.begin(version + 1)
    finally:
        channel.close()


def test_stop_leaves_nothing(engine):
    """Last test of this engine."""
    assert len(group_members(engine.rollout._process)) >= 3
    engine.run(engine.rollout.stop())
    assert_nothing_is_left(engine)
    engine.run(engine.rollout.stop())
    with pytest.raises(EngineError, match="not running"):
        engine.generate(requests(1, 1))


def test_bf16_two_ranks_and_the_death_of_the_server(old_weights, new_weights, tmp_path):
    """Compare bf16 routes and log-probabilities with fp32 transformers': few routes differ.

    A killed server takes its processes with it, and the rollout reports its death at once.
    """
    engine = Engine(configuration(old_weights, "bfloat16", tp_size=2), tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        differ, entries = 0, 0
        channel = channel_to(engine)
        send(channel, new_weights, 1, size=50_000)
        channel.close()
        engine.run(engine.rollout.on_weights_updated(1))
        for t in trajectories(engine.generate(requests(8, 4))).values():
            log_probs_R, ids_MRK = Reference(new_weights, 1.0).log_probs_and_experts(t)
            differ += int((np.sort(t.routes.ids_MRK) != np.sort(ids_MRK)).any(-1).sum())
            entries += ids_MRK.shape[0] * ids_MRK.shape[1]
            assert np.abs(t.log_probs - log_probs_R).mean() < 0.1
        print("entries that differ", differ, "of", entries)
        assert differ < 0.1 * entries
        assert len(group_members(engine.rollout._process)) >= 4
        os.kill(engine.rollout._process.pid, signal.SIGKILL)
        assert engine.generate(requests(1, 1))[0].lost == ("p0/s0",)
        why = engine.run(engine.rollout.why_down(ask=False))
        assert re.match(r"engine 0 \(vLLM\) died.*was killed by SIGKILL", why)
        assert_nothing_is_left(engine)
    finally:
        engine.close()


def test_a_tied_model_is_updated_and_lacks_nothing_by_being_tied(tmp_path):
    """Omit the embedding, also the output layer of a tied model: such an update is not whole."""
    old, new = (
        make_tiny_checkpoint(tmp_path / str(seed), seed=seed, head_dim=HEAD_DIM, tie_word_embeddings=True)
        for seed in (0, 1)
    )
    weights = load_file(new / "model.safetensors")
    assert "lm_head.weight" not in weights
    engine = Engine(configuration(old, generating={"temperature": TEMPERATURE}), tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        whole = channel_to(engine)
        send(whole, new, 1)
        whole.close()
        engine.run(engine.rollout.on_weights_updated(1))
        assert_is_what_the_model_computes(engine.generate(requests(4, 2)), new, 1)
        first = channel_to(engine)  # a trainer that has not yet sent a whole update
        first.begin(2)
        del weights["model.embed_tokens.weight"]
        for bucket in first.buckets(weights.items(), 1 << 20):
            first.send(bucket)
        with pytest.raises(EngineError, match=r"refused /finish_weight_update.*are incomplete: .*embed_tokens"):
            first.end()
        first.close()
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed", "olmoe", "qwen2_moe"])
def test_other_architectures_before_and_after_an_update(tmp_path, name):
    """Include `qwen3_moe_mixed`: its dense layer among the MoE layers is left out of the routes."""
    old, new = tiny(tmp_path / "old", name), tiny(tmp_path / "new", name, seed=1)
    engine = Engine(configuration(old, generating={"temperature": TEMPERATURE}), tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        assert_is_what_the_model_computes(engine.generate(requests(4, 2)), old)
        channel = channel_to(engine)
        send(channel, new, 1)
        channel.close()
        engine.run(engine.rollout.on_weights_updated(1))
        print(name, assert_is_what_the_model_computes(engine.generate(requests(4, 2)), new, 1))
    finally:
        engine.close()


def try_to_start(config: Any, tmp_path: Path) -> None:
    log_path = tmp_path / "server.log"
    asyncio.run(VllmRollout(engine_role(config), EnginePlace(0, "cpu", (), log_path)).start())


def test_kept_tokens_come_back_and_the_trainers_take_their_log_probs_over_them(old_weights, tmp_path, gang):
    """With prefill in chunks, prompts with shared rows, and a request for the whole distribution afterwards."""
    generating = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    config = configuration(old_weights, generating=generating, server_args={"max_num_batched_tokens": 64})
    engine = Engine(config, tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        asked = [*requests(6, 4), *long_requests(1, 4)]
        by_top_k, by_top_p = (engine.generate(asked, **sampling) for sampling in (BY_TOP_K, BY_TOP_P))
        likeliest = engine.run(evaluate(engine.rollout, requests(4, 2), greedy=True))
        whole = engine.generate(requests(4, 2), top_k=-1, top_p=1.0, temperature=TEMPERATURE, return_kept=False)
    finally:
        engine.close()
    assert_sets_are_what_was_sampled_from(by_top_k, old_weights, BY_TOP_K, one_by_one=True)
    assert_sets_are_what_was_sampled_from(by_top_p, old_weights, BY_TOP_P, one_by_one=True)
    assert_trainers_agree([*by_top_k, *by_top_p], old_weights, gang)
    assert_is_what_the_model_computes(whole, old_weights)
    assert_likeliest(likeliest, Reference(old_weights), 1e-5)
    assert all(t.kept is None for t in trajectories([*whole, *likeliest]).values())


def test_what_cannot_be_stops_the_start(old_weights, tmp_path):
    with pytest.raises(ConfigError, match=r"server_args\.speculative_config: draft tokens"):
        try_to_start(configuration(old_weights, server_args={"speculative_config": "{}"}), tmp_path)
    with pytest.raises(ConfigError, match=r"attention heads of 32, .* and the model's 16"):
        try_to_start(configuration(make_tiny_checkpoint(tmp_path / "narrow")), tmp_path)
    with pytest.raises(EngineError, match=r"cannot run strategy_config\.python"):
        try_to_start(configuration(old_weights, python="/no/such/python"), tmp_path)
    with pytest.raises(EngineError, match=r"did not start: .* exited with code 2; .*(?s:.*)no-such-argument"):
        try_to_start(configuration(old_weights, server_args={"no_such_argument": 1}), tmp_path)
