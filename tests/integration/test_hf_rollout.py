"""Rollout by transformers: the contract against a plain forward of each architecture, and new weights."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_cases import BY_TOP_K, BY_TOP_P, assert_sets_are_what_was_sampled_from, assert_trainers_agree
from own_code import with_code_of_its_own
from rollout_cases import (
    STOPS,
    Reference,
    Rollout,
    assert_likeliest,
    assert_stopped_where_asked,
    evaluate,
    generate,
    one_group,
    requests,
    rollout_config,
    trajectories,
)
from safetensors.torch import load_file, save_file

from roll_r3.config.engine_role import engine_role
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.engines.hf.strategy import HfRollout
from roll_r3.engines.sample import SampleRequest
from roll_r3.errors import ConfigError, EngineError
from roll_r3.models.tiny import TINY_MODELS, make_tiny_checkpoint
from roll_r3.strategies.base import EnginePlace, GenerateResult, ProcessInfo, WeightTarget
from roll_r3.strategies.registry import STRATEGIES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TEMPERATURE, LONGEST = 0.8, 12
END = 258
"""End-of-sequence token of the tiny tokenizer."""


class Engine(Rollout[HfRollout]):
    """A strategy on its own event loop."""

    def __init__(
        self,
        checkpoint: Path,
        mode: str = "R3",
        generating: dict[str, Any] | None = None,
        trust: bool = False,
        fp32_lm_head: bool = False,
        **settings: Any,
    ) -> None:
        config = rollout_config(
            checkpoint,
            "hf_infer",
            {"dtype": "float32", **settings},
            mode=mode,
            generating={"temperature": TEMPERATURE, **(generating or {})},
            model_args={"trust_remote_code": trust},
            response_length=LONGEST,
        ).model_copy(update={"fp32_lm_head": fp32_lm_head})
        super().__init__(HfRollout(engine_role(config), EnginePlace(0, "cpu", (), Path("unused"))))
        self.run(self.rollout.start())


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def run(*args: Any, **settings: Any) -> Engine:
        engines.append(Engine(*args, **settings))
        return engines[-1]

    yield run
    for engine in engines:
        engine.close()


def assert_is_what_the_model_computes(results: Sequence[GenerateResult], checkpoint: Path, version: int = 0) -> float:
    """Return the largest difference of a log-probability."""
    reference, differences = Reference(checkpoint, TEMPERATURE), []
    for t in trajectories(results).values():
        log_probs_R, ids_MRK = reference.log_probs_and_experts(t)
        assert t.routes.ids_MRK.dtype == np.uint8
        assert t.routes.ids_MRK.shape == ids_MRK.shape
        assert t.routes.num_rows == len(t.prompt_ids) + len(t.response_ids) - 1
        np.testing.assert_array_equal(np.sort(t.routes.ids_MRK), np.sort(ids_MRK))
        np.testing.assert_allclose(t.log_probs, log_probs_R, atol=1e-5, rtol=0)
        differences.append(np.abs(t.log_probs - log_probs_R).max())
        assert t.weight_versions == (version,)
        stopped = t.response_ids[-1] == END
        assert END not in t.response_ids[:-1]
        assert t.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(t.response_ids) == LONGEST
    return max(differences)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_routes_and_log_probs_are_those_of_a_plain_forward(tmp_path, start, name):
    """Share a batch between prompts of 3 to 9 tokens, so most are padded."""
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", name, seed=1)
    asked = requests(8, 8)
    results = start(checkpoint).generate(asked)
    for request, result in zip(asked, results, strict=True):
        assert tuple(t.sample_id for t in result.trajectories) == request.sample_ids
        assert {tuple(t.prompt_ids) for t in result.trajectories} == {request.prompt_ids}
    print(name, assert_is_what_the_model_computes(results, checkpoint))


def test_an_fp32_head_does_not_round_the_logits_of_a_bf16_engine(tiny_moe, start):
    engine = start(tiny_moe, dtype="bfloat16", fp32_lm_head=True)
    head, seen = engine.rollout._model.model.lm_head, []
    head.register_forward_hook(lambda _, inputs, logits: seen.append((inputs[0][0, -1], logits[0, -1])))
    (t,) = trajectories(engine.generate(requests(1, 1))).values()
    hidden_RH, logits_RV = (torch.stack(part) for part in zip(*seen, strict=True))
    exact_RV = hidden_RH.double() @ head.weight.double().T
    assert (hidden_RH.dtype, head.weight.dtype, logits_RV.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    chosen_R1 = torch.tensor(t.response_ids).long()[:, None]
    for logits, far in ((exact_RV, False), (exact_RV.bfloat16().double(), True)):
        wanted_R = (logits / TEMPERATURE).log_softmax(-1).gather(-1, chosen_R1)[:, 0].numpy()
        assert (np.abs(t.log_probs - wanted_R).max() > 1e-4) == far


def test_routes_are_the_top_k_of_the_routers_logits(tiny_moe, start):
    for t in trajectories(start(tiny_moe).generate(requests(4, 2))).values():
        _, ids_MRK = Reference(tiny_moe).log_probs_and_routes(t)
        np.testing.assert_array_equal(t.routes.ids_MRK, ids_MRK, "in the router's order")


def test_a_sample_follows_from_its_seed_whatever_shares_its_batch(tiny_moe, start):
    asked = [replace(r, seeds=tuple(seed * 7919 % 1009 for seed in r.seeds)) for r in requests(6, 4)]
    together = trajectories(start(tiny_moe).generate(asked))
    alone = trajectories(start(tiny_moe, max_running_requests=1).generate(asked[::-1]))
    for sample_id, t in together.items():
        np.testing.assert_array_equal(t.response_ids, alone[sample_id].response_ids)
        np.testing.assert_array_equal(t.routes.ids_MRK, alone[sample_id].routes.ids_MRK)
        np.testing.assert_allclose(t.log_probs, alone[sample_id].log_probs, atol=1e-5, rtol=0)
    assert len({t.response_ids.tobytes() for t in together.values()}) == len(together), "seeds differ, samples too"


def test_short_prompts_long_prompts_and_samples_that_stop(tiny_moe, tmp_path, start):
    """Use a model trained to stop: some samples of a batch end early, others continue."""
    learned = make_tiny_checkpoint(tmp_path / "tiny", examples=addition_mod10(), warm_start_steps=30)
    engine = start(learned)
    one, none, long = (one_group(ids, (f"{len(ids)}",), (5,)) for ids in ((7,), (), (7,) * 4090))
    results = engine.generate([one, none, long, *requests(4, 8)])
    assert "the prompt is empty" in results[1].dropped["0"]
    assert "may have 4102 tokens" in results[2].dropped["4090"]
    assert results[0].trajectories[0].routes.num_rows == len(results[0].trajectories[0].response_ids)
    assert_is_what_the_model_computes([results[0], *results[3:]], learned)
    reasons = {t.finish_reason for r in results for t in r.trajectories}
    assert reasons == {"stop", "length"}


def test_stop_tokens_and_stop_strings_end_a_response(tiny_moe, start):
    assert_stopped_where_asked(start(tiny_moe, generating=STOPS).generate(requests(6, 8)), tiny_moe)


def test_a_truncated_distribution_is_sampled_from_and_log_probs_are_of_the_whole(tiny_moe, start):
    generating = {"top_k": 1, "sampling_mask": False}
    greedy = trajectories(start(tiny_moe, generating=generating).generate(requests(3, 2)))
    for t in greedy.values():
        np.testing.assert_allclose(t.log_probs, Reference(tiny_moe, TEMPERATURE).log_probs(t), atol=1e-5, rtol=0)
    assert all((greedy[f"p{p}/s0"].response_ids == greedy[f"p{p}/s1"].response_ids).all() for p in range(3))


def test_an_evaluation_takes_the_likeliest_tokens(tiny_moe, start):
    engine = start(tiny_moe)
    assert_likeliest(engine.run(evaluate(engine.rollout, requests(4, 2), greedy=True)), Reference(tiny_moe), 1e-4)


def test_kept_tokens_come_back_and_the_trainers_take_their_log_probs_over_them(tiny_moe, start, gang):
    engine = start(tiny_moe)
    by_top_k, by_top_p = (engine.generate(requests(6, 4), **sampling) for sampling in (BY_TOP_K, BY_TOP_P))
    assert_sets_are_what_was_sampled_from(by_top_k, tiny_moe, BY_TOP_K)
    assert_sets_are_what_was_sampled_from(by_top_p, tiny_moe, BY_TOP_P)
    assert_trainers_agree([*by_top_k, *by_top_p], tiny_moe, gang)


def test_nothing_is_recorded_unless_it_is_asked_for(tiny_moe, start):
    (result,) = start(tiny_moe, mode="disable").generate(requests(1, 2))
    assert [t.routes for t in result.trajectories] == [None, None]


def test_the_actors_loop_lives_while_the_model_runs(tiny_moe, start):
    engine = start(tiny_moe)

    async def both() -> int:
        task, beats = asyncio.create_task(generate(engine.rollout, requests(8, 4))), 0
        while not task.done():
            await asyncio.sleep(0.002)
            beats += 1
        await task
        return beats

    assert engine.run(both()) > 5


def test_samples_of_an_aborted_request_are_in_no_later_batch(tiny_moe, start, monkeypatch):
    engine = start(tiny_moe, max_running_requests=4)
    batches: list[list[str]] = []
    sample = engine.rollout._model.sample

    def recorded(jobs: Sequence[SampleRequest], version: int) -> Any:
        batches.append([job.sample_id for job in jobs])
        return sample(jobs, version)

    monkeypatch.setattr(engine.rollout._model, "sample", recorded)

    async def scenario() -> list[GenerateResult | BaseException]:
        tasks = [asyncio.create_task(generate(engine.rollout, [request])) for request in requests(4, 4)]
        while not batches:
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = engine.run(scenario())
    assert [type(one) for one in found] == [asyncio.CancelledError, list, asyncio.CancelledError, list]
    assert batches == [[f"p{i}/s{j}" for j in range(4)] for i in (0, 1, 3)]
    assert_is_what_the_model_computes([*found[1], *found[3]], tiny_moe)


CHANNELS: list[Any] = []
"""Channels in the trainer's process: group names are known only in their own process."""


def connect(process: ProcessInfo, target: WeightTarget) -> None:
    """Open the sending end registered for this strategy."""
    CHANNELS.append(STRATEGIES["hf_infer"].load_channel()([target], device="cpu", timeout_s=20.0))


def send(process: ProcessInfo, weights: dict[str, torch.Tensor], version: int, *, end: bool = True) -> str:
    """Return the error; empty if there was none."""
    channel = CHANNELS[-1]
    try:
        channel.begin(version)
        for bucket in channel.buckets(weights.items(), 100_000):
            channel.send(bucket)
        if end:
            channel.end()
    except EngineError as error:
        return str(error)
    return ""


def disconnect(process: ProcessInfo) -> None:
    CHANNELS.pop().close()


@pytest.fixture
def update(gang, start) -> Iterator[Callable[..., str]]:
    """Give `update(engine, weights, version)`: send from another process through one channel."""
    connected: list[Engine] = []

    def run(engine: Engine, *args: Any) -> str:
        if not connected:
            gang(1).run(connect, engine.rollout.weight_target())
            connected.append(engine)
        return gang(1).run(send, *args)[0]

    yield run
    gang(1).run(disconnect)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_new_weights_arrive_and_samples_follow_them(tmp_path, start, update, name):
    old, new = (make_tiny_checkpoint(tmp_path / str(seed), name, seed=seed) for seed in (0, 1))
    engine = start(old)
    assert_is_what_the_model_computes(engine.generate(requests(3, 2)), old)
    for version, checkpoint in ((1, new), (2, old)):
        assert update(engine, load_file(checkpoint / "model.safetensors"), version) == ""
        (refused,) = engine.generate(requests(1, 2))
        assert f"version {version}, not {version - 1}" in refused.dropped["p0/s0"]
        engine.run(engine.rollout.on_weights_updated(version))
        assert_is_what_the_model_computes(engine.generate(requests(3, 2)), checkpoint, version)


def test_an_update_that_is_not_whole_leaves_an_engine_that_answers_nothing(tiny_moe, start, update):
    engine = start(tiny_moe)
    weights = load_file(tiny_moe / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    del weights[name]
    assert f"1 of {len(weights) + 1} weights never came: {name}" in update(engine, weights, 1)
    for version in (0, 1):
        engine.run(engine.rollout.on_weights_updated(version))
        (result,) = engine.generate(requests(1, 1))
        assert f"version 1-incomplete, not {version}" in result.dropped["p0/s0"]
    assert "an earlier weight update failed" in update(engine, weights, 2)


@pytest.mark.parametrize(
    ("name", "shape", "held"), [("model.norms.weight", 64, "no such tensor"), ("model.norm.weight", 5, "[64]")]
)
def test_a_weight_that_the_model_has_not_is_refused(tiny_moe, start, update, name, shape, held):
    refused = update(start(tiny_moe), {name: torch.ones(shape)}, 1)
    assert refused.startswith("engine 0 (transformers) did not take the weights: ")
    assert f"{name} has shape [{shape}], the model has {held}" in refused


def test_nobody_gets_in_without_the_key(tiny_moe, start, gang):
    target = replace(start(tiny_moe).rollout.weight_target(), api_key="wrong")
    gang(1).run(connect, target)
    assert "wrong key" in gang(1).run(send, {}, 1)[0]
    gang(1).run(disconnect)


def test_a_checkpoints_own_code_is_never_the_model(tmp_path, start):
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=1)
    ran = with_code_of_its_own(checkpoint)
    assert_is_what_the_model_computes(start(checkpoint, trust=True).generate(requests(1, 1)), checkpoint)
    assert not ran.exists()


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path, lost):
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=1)
    weights = load_file(checkpoint / "model.safetensors")
    del weights[lost]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"lacks the weights of {re.escape(lost)} \(1 in all\)"):
        Engine(checkpoint)


def test_weights_that_are_pickled_are_never_read(tmp_path):
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=1)
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"tiny holds no \*\.safetensors: convert the checkpoint first"):
        Engine(checkpoint)


def test_a_forward_that_failed_leaves_no_routes_to_the_next(tiny_moe, start):
    engine = start(tiny_moe)
    failing = engine.rollout._model.model.model.layers[2].register_forward_pre_hook(lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(requests(1, 1))
    failing.remove()
    assert_is_what_the_model_computes(engine.generate(requests(2, 2)), tiny_moe)


def test_an_engine_started_again_has_the_checkpoint_and_waits_for_weights(tiny_moe, start, update):
    engine = start(tiny_moe)
    weights = load_file(tiny_moe / "model.safetensors")
    old = engine.rollout.weight_target()
    assert update(engine, weights, 3) == ""
    engine.run(engine.rollout.on_weights_updated(3))
    engine.run(engine.rollout.restart())
    assert engine.run(engine.rollout.why_down(ask=True)) == ""
    assert engine.rollout.weight_target().api_key != old.api_key
    with pytest.raises(EngineError, match="has the checkpoint's weights: an update comes first"):
        engine.generate(requests(1, 1))
    engine.run(engine.rollout.on_weights_updated(0))
    assert_is_what_the_model_computes(engine.generate(requests(2, 2)), tiny_moe)


def test_nothing_is_sampled_before_the_start_and_after_the_end(tiny_moe):
    engine = Engine(tiny_moe)
    engine.run(engine.rollout.stop())
    engine.run(engine.rollout.stop())
    with pytest.raises(EngineError, match="not running"):
        engine.generate(requests(1, 1))
    engine.close()
