"""Reward rules that raise, hang, crash or answer nonsense, in real reward processes."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from faults import Fault, nothing_left
from reward_processes import LIMIT, MISBEHAVES, Open, asked, ended, rewards, score
from whole_run import START_TIMEOUT, Run, few_steps

from roll_r3.config.rewards import RewardConfig
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.errors import ConfigError, RollError
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.rewards.process_pool import RewardProcesses
from roll_r3.rewards.reward_process import Failure, Task
from roll_r3.rewards.rules import Rule
from roll_r3.rewards.scoring import Rewards

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

__all__ = ["rewards"]


def test_scores_come_in_order_and_are_those_of_the_function_itself(rewards: Open) -> None:
    rng = np.random.default_rng(0)
    texts = [repr(x) for x in rng.standard_normal(50).tolist()]
    texts[::7] = [f"seconds {x:.3f}" for x in rng.random(len(texts[::7])) / 20]  # ends them in another order
    wanted = [float(text.removeprefix("seconds ")) for text in texts]
    assert score(rewards(workers=4), *texts) == wanted


def test_a_rule_finds_the_environment_of_the_run(rewards: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys belong into the environment: the configuration is printed and saved."""
    monkeypatch.setenv("REWARD_KEY", "0.25")
    assert score(rewards(workers=1), "environment REWARD_KEY") == [0.25]


def test_every_domain_has_its_rule_and_kwargs(tmp_path: Path) -> None:
    rules = {
        "exact": RewardConfig(reward="exact_match"),
        "letters": RewardConfig(reward=f"{__name__}:count", tag_included=("abc",), kwargs={"letter": "b"}),
        "math": RewardConfig(reward="math", tag_included=("math",)),
    }
    with Rewards(rules, workers=1, max_failed=0.1, log_dir=tmp_path) as found:
        found.wait_until_ready()
        texts = [(" 4\n", "4", "other"), ("abbb", "", "abc"), (r"$\frac{1}{2}$", "0.5", "math"), ("5", "4", "default")]
        assert found.score([asked(*each) for each in texts]).scores == [1.0, 3.0, 1.0, 0.0]


def count(response: str, ground_truth: str, letter: str = "a") -> float:
    return float(response.count(letter))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise no such luck", "raised ValueError: no such luck"),
        ("quit", "raised SystemExit: enough"),
        ("loop", r"did not return within 1(\.\d)? s"),
        ("sleep", r"did not return within 1(\.\d)? s"),
        ("fork", "ended its process (exit code 3)"),
        ("exit 0", "ended its process (exit code 0)"),
        ("exit 7", "ended its process (exit code 7)"),
        ("segfault", "killed its process (SIGSEGV)"),
        ("return None", "must return a number, returned None"),
        ("return list", "must return a number, returned a list"),
        ("return text", "must return a number, returned a str"),
        ("return nan", "must return a finite number, returned nan"),
    ],
)
def test_a_rule_that_fails_costs_its_own_response_only(rewards: Open, text: str, reason: str) -> None:
    found = rewards()
    began = time.monotonic()
    scored = found.score([asked(each) for each in ("1", text, "2", "3")])
    assert scored.scores == [1.0, None, 2.0, 3.0]
    pattern = reason if reason.startswith("did not") else re.escape(reason)
    assert re.fullmatch(re.escape(f"rewards.mine ({MISBEHAVES}) ") + pattern, scored.why)
    assert time.monotonic() - began < LIMIT + 15
    assert score(found, "4", "5", "6") == [4.0, 5.0, 6.0], "killed processes were restarted"


def test_each_failure_is_in_the_log_with_its_response(rewards: Open, caplog: pytest.LogCaptureFixture) -> None:
    score(rewards(), "1", "raise this", "long")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "rewards.mine (reward_rules:misbehaves) raised ValueError: this for the response 'raise this'" in said[0]
    assert len(said[1]) < 1000


def test_output_of_a_rule_goes_to_a_log(rewards: Open, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert score(rewards(workers=1), "print 5000000", "raise seen") == [1.0, None]
    out, err = capfd.readouterr()
    assert len(out) + len(err) < 1000
    log = (tmp_path / "rewards-0.log").read_text()
    assert (log.count("x"), log.count("y")) > (5_000_000, 5_000_000)
    assert "ValueError: seen" in log


def test_children_of_a_rule_are_killed_with_it(rewards: Open, tmp_path: Path) -> None:
    assert score(rewards(kwargs={"folder": str(tmp_path)}), "child", "1") == [None, 1.0]
    assert ended(int((tmp_path / "child").read_text()))


def test_a_death_between_two_responses_costs_nothing(rewards: Open) -> None:
    found = rewards(workers=1)
    (pid,) = score(found, "pid")
    assert pid is not None
    os.kill(int(pid), signal.SIGKILL)
    assert ended(int(pid))
    assert score(found, "1", "2") == [1.0, 2.0]
    assert score(found, "late death") == [1.0]
    time.sleep(0.5)
    assert score(found, "3") == [3.0]


def test_too_many_failures_stop_at_once_with_their_reasons(rewards: Open) -> None:
    found = rewards(max_failed=0.25)
    assert score(found, "raise a", "raise a", *["1"] * 6)[:3] == [None, None, 1.0]
    began = time.monotonic()
    with pytest.raises(RollError) as stopped:
        score(found, "raise a", "raise a", "raise b", *["sleep"] * 5, *["1"] * 2)
    assert time.monotonic() - began < LIMIT + 1, "the other responses are not waited for"
    assert str(stopped.value).startswith(
        "3 of the step's 10 responses have no reward, more than max_failed_rewards 0.25 allows: "
        f"rewards.mine ({MISBEHAVES}) raised ValueError: a (2 times); rewards.mine ({MISBEHAVES}) raised ValueError: b"
    )
    assert score(found, "1", "2") == [1.0, 2.0], "nothing of what was abandoned is taken for an answer"


def test_a_signal_leaves_no_answers_behind(rewards: Open) -> None:
    """SIGTERM in a run raises such an exception."""

    def breaks_off(*_: object) -> None:
        raise KeyboardInterrupt

    found = rewards(workers=2)
    previous = signal.signal(signal.SIGALRM, breaks_off)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            score(found, "seconds 0.6", "seconds 0.7", "1", "2")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert score(found, "3", "4", "5") == [3.0, 4.0, 5.0]


def test_no_failure_is_allowed_where_the_limit_is_0(rewards: Open) -> None:
    with pytest.raises(RollError, match="1 of the step's 2 responses"):
        score(rewards(max_failed=0.0), "1", "raise a")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("no_such_module:f", "rewards.mine.reward: cannot import 'no_such_module:f'"),
        ("broken_at_import:f", "rewards: an import raised ZeroDivisionError: division by zero"),
        ("dead_at_import:f", r"reward process \d ended its process \(exit code 5\) while importing the rules"),
    ],
)
def test_a_failing_import_stops_the_start(
    rewards: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, said: str
) -> None:
    (tmp_path / "broken_at_import.py").write_text("1 / 0")
    (tmp_path / "dead_at_import.py").write_text("import os; os._exit(5)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=said):
        rewards(rule)


@pytest.mark.parametrize("busy", [True, False], ids=["in an endless loop", "idle"])
def test_processes_die_with_the_driver(tmp_path: Path, busy: bool) -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.path[:] = {sys.path!r}
from roll_r3.rewards.functions import Response
from roll_r3.rewards.reward_process import Task
from roll_r3.rewards.process_pool import RewardProcesses
from roll_r3.rewards.rules import Rule
found = RewardProcesses([Rule("mine", "{MISBEHAVES}", {{}}, 600.0)], 2, Path({str(tmp_path)!r}))
found.start()
found.wait_until_ready()
print("ready", flush=True)
if {busy}:
    found.score([Task(0, Response("loop", "", "", "", (), {{}}, "stop", 1))] * 2)
time.sleep(600)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline().strip() == "ready"
        children = psutil.Process(driver.pid).children()
        assert len(children) == 2
        deadline = time.monotonic() + 30
        while busy and min(child.cpu_times().user for child in children) < 1:
            assert time.monotonic() < deadline, "they do not loop"
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    assert all(ended(child.pid) for child in children)


def test_at_most_one_response_is_with_each_process(tmp_path: Path) -> None:
    """The number of responses sent and not yet scored is bounded."""
    found = RewardProcesses([Rule("mine", MISBEHAVES, {}, 60.0)], 2, tmp_path)
    found.start()
    try:
        found.wait_until_ready()
        given: list[int] = []
        for process in found._processes:
            give = process.give

            def counted(index: int, task: Task, give: Any = give) -> bool:
                assert give(index, task)
                given.append(sum(p.task is not None for p in found._processes))
                return True

            process.give = counted  # type: ignore[method-assign]
        tasks = [Task(0, asked("seconds 0.01"))] * 20
        assert found.score(tasks) == [0.01] * 20
        assert (len(given), max(given)) == (20, 2)
        assert not any(isinstance(answer, Failure) for answer in found.score(tasks))
    finally:
        found.close()


def test_a_step_of_cheap_rewards_stays_cheap(rewards: Open) -> None:
    """128 responses through the processes take a hundredth of a step."""
    found = rewards("exact_match", workers=2)
    responses = [asked(f"{i} " * 200, f"{i}") for i in range(128)]
    found.score(responses)
    seconds = math.inf
    for _ in range(5):
        began = time.perf_counter()
        assert found.score(responses).scores == [0.0] * 128
        seconds = min(seconds, time.perf_counter() - began)
    print(f"{seconds * 1000:.1f} ms for 128 responses")
    assert seconds < 0.5


@pytest.fixture(scope="module")
def fallen(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Whole run of three steps with all faults of `reward_rules.PLAN`; leaves no process behind."""
    path = tmp_path_factory.mktemp("fallen")
    checkpoint = make_tiny_checkpoint(path / "tiny", examples=addition_mod10(), warm_start_steps=60)
    with pytest.MonkeyPatch.context() as patch, nothing_left():
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        run = Run(
            path,
            checkpoint,
            *few_steps(3),
            "actor_infer.strategy_args.strategy_name=hf_infer",
            "actor_infer.strategy_args.strategy_config.dtype=float32",
            "adv_estimator=reinforce",
            f"rewards.default={{reward: 'reward_rules:falls_over', timeout: 5, kwargs: {{folder: {path}}}}}",
            "reward_workers=2",
            config="quickstart_engines",
        )
        try:
            assert run.finish(START_TIMEOUT) == 0, run.stderr.read_text()
        finally:
            run.end()
    return run


def test_a_run_goes_on_without_the_responses_that_have_no_reward(fallen: Run) -> None:
    metrics = fallen.metrics()
    assert [m["reward/failed"] for m in metrics] == [3, 0, 0]
    assert [m["system/samples"] for m in metrics] == [125, 253, 381]
    assert [m["router_replay/coverage"] for m in metrics] == [1.0] * 3
    said = fallen.stderr.read_text()
    assert said.count("responses without a reward") == 1
    assert "Traceback" not in said
    log = (fallen.path / "logs" / "driver.log").read_text()
    assert log.count("rewards.default (reward_rules:falls_over)") == 3
    oom_scores = (fallen.output.parent / "oom_scores").read_text().split()
    assert oom_scores, "the run's workers were found"
    assert set(oom_scores) == {"500"}, "where memory runs out, the kernel takes a reward process first: theirs is 1000"
    assert "Segmentation fault" in "".join((fallen.path / "logs" / f"rewards-{i}.log").read_text() for i in (0, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("raise it", "raised ValueError: ", marks=pytest.mark.fault("a reward function raises")),
        pytest.param("loop", "did not return within ", marks=pytest.mark.fault("a reward function never ends")),
        pytest.param(
            "segfault",
            "killed its process (SIGSEGV)",
            marks=pytest.mark.fault("a reward function crashes its process"),
        ),
    ],
)
def test_what_is_seen_of_a_reward_that_failed(fault: Fault, rewards: Open, fallen: Run, text: str, said: str) -> None:
    (line,) = [line for line in fallen.stderr.read_text().splitlines() if "responses without a reward" in line]
    assert line.startswith("step 1: dropped 3 of 128 responses without a reward: rewards.default (")
    assert f"rewards.default (reward_rules:falls_over) {said}" in line
    found = rewards()
    began = time.monotonic()
    assert score(found, text, "1", "2", "3") == [None, 1.0, 2.0, 3.0]
    assert score(found, "4", "5") == [4.0, 5.0]
    fault.user_sees(f"step 1: dropped 1 of 128 responses without a reward: rewards.mine (my.rules:score) {said}...")
    fault.recovered(time.monotonic() - began)
    fault.lost("these responses; more than max_failed_rewards stop the run")


@pytest.mark.fault("a gradient is not finite")
def test_what_is_seen_of_an_advantage_that_overflows(fault: Fault, fallen: Run) -> None:
    metrics = fallen.metrics()
    made = [m["actor_train/optimizer_steps"] for m in metrics]
    skipped = [m["actor_train/skipped_steps"] for m in metrics]
    assert made[0] == made[2] == made[1] + skipped[1] == 2
    assert (skipped[0], skipped[2]) == (0, 0)
    assert 1 <= skipped[1] <= 2
    lines = [line for line in fallen.stderr.read_text().splitlines() if "was skipped" in line]
    assert len(lines) == skipped[1]
    assert all(re.match(r"step 2: the gradient norm is (nan|inf): optimizer step [12] was skipped", x) for x in lines)
    assert all(math.isfinite(metrics[2][name]) for name in ("actor_train/grad_norm", "actor/pg_loss"))
    fault.user_sees("step 2: the gradient norm is nan: optimizer step 1 was skipped")
    fault.recovered(metrics[1]["time/step_train"])
    fault.lost("that optimizer step; more than max_skipped_steps in a row stop the run")
