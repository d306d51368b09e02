"""Whole program as started by a user: SGLang, Megatron on two ranks, Ray; and the messages after a part is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from whole_run import START_TIMEOUT, Run, few_steps

from roll_r3.batch.token_map import round_up
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.engines.sglang.launcher import KEY_VARIABLE
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_tiny_checkpoint(path, examples=addition_mod10(), warm_start_steps=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("finished"), checkpoint, *few_steps(3))
    try:
        assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
        yield run
    finally:
        run.end()


def test_replay_covers_every_trained_token_through_pipeline_and_recomputation(finished):
    metrics = finished.metrics()
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for m in metrics:
        assert m["router_replay/coverage"] == 1.0
        assert m["router_replay/missing_rows"] == 0
        assert 0 < m["router_replay/agreement_native"] <= 1
        assert_compact(m, 4 * 2, layers=4)
        assert m["actor_train/optimizer_steps"] == 2
        assert m["rollout/dropped_samples"] == 0
    assert metrics[0]["actor/rollout_train_logprobs_abs_diff_mean"] < 0.1, "both sides hold the same weights"
    # the trainer is fp32 and the rollout bf16: after updates both must still be the same policy
    assert metrics[2]["actor/rollout_train_logprobs_abs_diff_mean"] < 0.1, "updated weights reach the engine"


def assert_compact(step, ids, layers, samples=8):
    """Check sizes by docs/wire_format.md: a group has its head, and between one and all of its samples' rows."""
    rows = step["tokens/prompt_length/mean"] + step["tokens/response_length/mean"] - 1
    head = round_up(40 + 4 * (samples + 1) * (1 + layers), 64) / samples
    stored = step["router_replay/bytes_per_token"] * rows
    assert head + ids * rows / samples <= stored <= head + ids * rows, "MoE layers x top-k x 1 byte"


def test_a_run_leaves_what_was_promised(finished):
    path = finished.path
    assert (path / "config.yaml").is_file()
    assert list((path / "tensorboard").iterdir())
    logs = {p.name for p in (path / "logs").iterdir()}
    assert {"actor_train-0.log", "actor_train-1.log", "actor_infer-0.log", "reference-0.log", "driver.log"} <= logs
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3}
    summary = finished.stdout.read_text()
    assert str(path.resolve()) in summary
    assert "mean reward" in summary
    assert "coverage" in summary


def test_no_process_is_left(finished):
    marker = str(finished.output)
    left = [p.info for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.parametrize(
    ("model", "layout", "bytes_per_token"),
    [
        (
            "deepseek_v3",
            "{tensor_model_parallel_size: 2, expert_model_parallel_size: 2, moe_router_bias_update_rate: 0.001}",
            3 * 4,
        ),
        pytest.param("moonlight", "{context_parallel_size: 2}", 3 * 3, marks=pytest.mark.long),
    ],
)
def test_latent_attention_dense_layers_and_a_moving_bias_train_too(tmp_path, model, layout, bytes_per_token):
    """Run from the engine to the trainer and back, in other layouts, with the audit on; one layer of four is dense."""
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", model, examples=addition_mod10(), warm_start_steps=20)
    run = Run(
        tmp_path,
        checkpoint,
        *few_steps(3),
        f"actor_train.strategy_args.strategy_config={layout}",
        "actor_train.use_sequence_packing=true",
        "actor_train.use_dynamic_batching_in_train=true",
        "actor_train.max_tokens_per_microbatch_in_train=512",
        "actor_train.router_replay.audit=true",
        "actor_train.router_replay.audit_every=2",
        "rollout_correction={is_weight: token, is_floor: 0.5, is_cap: 5, opsm_delta: 0.5}",
        "rollout_correction.filters=[{level: geometric, low: 0.5, high: 2}]",
    )
    try:
        assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
        metrics = run.metrics()
    finally:
        run.end()
    assert [m["router_replay/coverage"] for m in metrics] == [1.0, 1.0, 1.0]
    assert [m.get("router_replay/audit_equal") for m in metrics] == [1.0, None, 1.0]
    assert_compact(metrics[0], bytes_per_token, layers=3)
    # the moved bias reaches the engine: it still samples from the trainer's policy
    assert max(m["actor/rollout_train_logprobs_abs_diff_mean"] for m in metrics) < 0.1
    assert min(m["router_replay/agreement_native"] for m in metrics) > 0.9
    for m in metrics:
        assert 0.9 < m["rollout_corr/ess"] <= 1
        assert m["actor/is_weight_mean"] == pytest.approx(1, abs=0.1)
        assert m["rollout_corr/rejected_samples"] == m["rollout_corr/opsm_samples"] == 0
        assert m["expert_load/live/entropy"] == pytest.approx(m["expert_load/rollout/entropy"], abs=0.05)
        assert len([name for name in m if name.startswith("expert_load/live/layer_")]) == 3


def test_r2_replays_the_trainers_own_pass_and_a_seed_samples_the_same_again(tmp_path, checkpoint, finished):
    modes = ("actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=disable")
    run = Run(tmp_path, checkpoint, *few_steps(2, *modes))
    try:
        assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
        metrics = run.metrics()
        assert [m["router_replay/coverage"] for m in metrics] == [1.0, 1.0]
        # another mode changes the update, not the samples of the first weights
        for name in ("critic/score/mean", "tokens/response_length/mean"):
            assert metrics[0][name] == finished.metrics()[0][name]
    finally:
        run.end()


def test_a_step_takes_the_first_groups_with_a_signal_from_each_section(tmp_path, checkpoint):
    """Filter, additional prompts and shares at once: aborts go through every worker to the engine.

    Few of the ten digits to repeat have a signal, so steps are smaller.
    """
    chosen = ("filter_groups={enable: true, max_num_gen_batches: 3}", "max_additional_running_prompts=8")
    run = Run(tmp_path, checkpoint, *few_steps(3, *chosen, "save_steps=3"), config="quickstart_domains")
    try:
        assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
        metrics = run.metrics()
        for m in metrics:
            repeated = m.get("repetition/rollout/groups", 0)
            assert m["addition/rollout/groups"] == 12
            assert repeated <= 4
            assert m["reward/groups_without_signal"] == 0
            assert m["router_replay/coverage"] == 1.0
            assert m["rollout/filter_kept_groups"] == 12 + repeated < m["rollout/filter_sampled_groups"]
        data = json.loads((run.path / "checkpoints" / "step-00000003" / "state.json").read_text())["data"]
        assert len(data["returned"]) == metrics[-1]["rollout/aborted_groups"] > 0
        drawn = sum(count * size for section in data["sections"].values() for count, size in section["drawn"])
        assert drawn == sum(m["rollout/filter_sampled_groups"] for m in metrics) + len(data["returned"])
    finally:
        run.end()


def engine_server(run: Run) -> int:
    """Return the process id of the SGLang server."""
    return next(p.pid for p in run.descendants() if any("launcher.py" in part for part in p.cmdline()))


SECRET = "a-secret-of-the-user"


def assert_the_variables_arrive(run: Run) -> None:
    """Check the environments of the engine's server, a rank and a reward process for `system_envs`."""
    rewards = [p.pid for p in run.descendants() if any("roll_r3.rewards.worker" in part for part in p.cmdline())]
    assert rewards
    for process in (engine_server(run), second_rank(run), rewards[0]):
        found = psutil.Process(process).environ()
        assert (found.get("DEMO_TOKEN"), found.get("DEMO_LEVEL")) == (SECRET, "level-7")


def assert_no_secret_shows(run: Run) -> None:
    """Check the run's files and all command lines for the server's key and the user's token."""
    key = psutil.Process(engine_server(run)).environ()[KEY_VARIABLE]
    assert len(key) > 20
    files = [p for p in run.path.resolve().rglob("*") if p.is_file()]
    assert len(files) > 5
    for secret in (key, SECRET):
        assert [p for p in [*files, run.stdout, run.stderr] if secret.encode() in p.read_bytes()] == []
    started = [p for p in run.descendants() if p.pid != run.process.pid]
    assert [p for p in started if key in (line := " ".join(p.cmdline())) or SECRET in line] == []


def second_rank(run: Run) -> int:
    """Return the process id of the second training rank, from its log."""
    log = (run.path / "logs" / "actor_train-1.log").read_text()
    return int(re.search(r"actor_train rank 1 is process (\d+)", log)[1])


def kill_in_step(run: Run, find: Callable[[Run], int]) -> float:
    """Kill a process in the second step; return the seconds until the run ended."""
    run.wait_for_step(1)
    os.kill(find(run), signal.SIGKILL)
    start = time.monotonic()
    run.finish(120)
    return time.monotonic() - start


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, left = psutil.wait_procs(processes, timeout=15)
    return [p for p in left if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("victim", "named"),
    [
        pytest.param(engine_server, "actor_infer-0", id="engine"),
        pytest.param(second_rank, "actor_train-1", id="rank", marks=pytest.mark.long),
    ],
)
def test_a_killed_part_ends_the_run_and_is_named(tmp_path, checkpoint, victim, named):
    limit = "actor_infer.strategy_args.strategy_config.max_restarts=0"
    variables = f"system_envs={{DEMO_TOKEN: {SECRET}, DEMO_LEVEL: level-7}}"
    run = Run(tmp_path, checkpoint, *few_steps(500), "max_recoveries=0", limit, variables)
    try:
        run.wait_for_step(1)
        processes = run.descendants()
        assert_the_variables_arrive(run)
        assert_no_secret_shows(run)
        seconds = kill_in_step(run, victim)
        message = run.stderr.read_text()
        assert run.process.returncode == 1, message
        assert named in message
        assert "log" in message
        print(message, f"after {seconds:.1f} s")
        assert "Traceback (most recent call last)" not in message.split("--- end of")[0]
        assert seconds < 60
        assert alive(processes) == []
    finally:
        run.end()
