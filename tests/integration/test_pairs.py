"""Every rollout with every trainer, as whole runs. `make engines` runs them all and writes docs/engines.md."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pairs import (
    BF16,
    FP32,
    MODES,
    ROLLOUTS,
    TRAINERS,
    Mismatch,
    Pair,
    check_new_weights_arrive,
    check_replay,
    metrics_of,
    write_page,
)
from vllm_cases import HEAD_DIM
from whole_run import few_steps

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_tiny_checkpoint(path, examples=addition_mod10(), warm_start_steps=60, head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", seed=3, head_dim=HEAD_DIM)


def marked(pair: Pair) -> object:
    """Mark a pair; SGLang with Megatron under R3 is covered by most other whole runs."""
    vllm, usual = pair.rollout == "vllm", pair == Pair("sglang", "megatron_train", "R3")
    marks = [pytest.mark.vllm] if vllm else [pytest.mark.long] if usual else []
    return pytest.param(pair, marks=marks, id=str(pair))


# Both replay modes with both trainers; `make engines` runs every pair under every mode.
EACH_PAIR = [
    Pair("sglang", "megatron_train", "R3"),
    Pair("sglang", "fsdp2_train", "R2"),
    Pair("hf_infer", "megatron_train", "R2"),
    Pair("hf_infer", "fsdp2_train", "R3"),
    Pair("vllm", "megatron_train", "R3"),
    Pair("vllm", "fsdp2_train", "R3"),
]


TRUNCATED = ("actor_infer.generating_args.top_k=20", "actor_infer.generating_args.top_p=0.95")


@pytest.mark.parametrize("pair", [marked(pair) for pair in EACH_PAIR])
def test_a_pair_trains_and_its_rollout_follows(pair, tmp_path, checkpoint):
    """Runs of FSDP2 sample from a truncated distribution; both sides take log-probabilities over the same tokens."""
    truncated = pair.trainer == "fsdp2_train"
    metrics = metrics_of(pair, tmp_path, checkpoint, *few_steps(2), *FP32, *(TRUNCATED if truncated else ()))
    check_replay(pair, metrics)
    check_new_weights_arrive(metrics)
    for step in metrics:
        assert step.get("sampling_mask/coverage") == (1.0 if truncated else None)
        assert not truncated or (1 < step["sampling_mask/mean_size"] < 20 and 0.9 < step["sampling_mask/mass"] < 1)


LONG = (
    "max_steps=1",
    "rollout_batch_size=24",
    "num_return_sequences_in_group=2",
    "response_length=96",
    "actor_train.infer_batch_size=8",
    "actor_train.training_args.per_device_train_batch_size=8",
    "actor_infer.generating_args.temperature=1.0",
    *BF16,
)


@pytest.mark.vllm  # SGLang too: it takes minutes, and docs/engines.md shows the same for every pair
@pytest.mark.parametrize("rollout", ["vllm", "sglang"])
def test_replay_takes_most_of_the_mismatch_away(rollout, tmp_path, random_weights):
    figures = {}
    for mode in ("disable", "R3"):
        pair = Pair(rollout, "fsdp2_train", mode)
        [step] = metrics_of(pair, tmp_path / mode, random_weights, *LONG)
        assert step["tokens/response_length/mean"] > 60, "long enough to tell"
        figures[mode] = Mismatch.of(step)
    print(figures)
    assert figures["R3"].mean < figures["disable"].mean / 2
    assert figures["R3"].largest < figures["disable"].largest


@pytest.mark.vllm
@pytest.mark.timeout(7200)
def test_all_pairs_for_the_page(request, tmp_path, checkpoint, random_weights):
    if not request.config.getoption("--write-engines"):
        pytest.skip("`make engines` runs all pairs and writes docs/engines.md")
    runs, synced, mismatches = {}, {}, {}
    for pair in itertools.starmap(Pair, itertools.product(ROLLOUTS, TRAINERS, MODES)):
        where = tmp_path / str(pair).replace(", ", "-")
        runs[pair] = metrics_of(pair, where / "bf16", checkpoint, *few_steps(2), *BF16)
        check_replay(pair, runs[pair])
        if pair.mode == "R3":
            synced[pair] = metrics_of(pair, where / "fp32", checkpoint, *few_steps(2), *FP32)
            check_new_weights_arrive(synced[pair])
        if pair.mode != "R2" and pair.rollout != "hf_infer":
            [step] = metrics_of(pair, where / "long", random_weights, *LONG)
            mismatches[pair] = Mismatch.of(step)
        print(pair, "ran")
    write_page(runs, synced, mismatches)
