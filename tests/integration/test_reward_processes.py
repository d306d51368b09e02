"""Values, environment and limits of reward processes; test_reward_faults.py has failing rules."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from reward_processes import MISBEHAVES, Open, asked, ended, rewards, score
from slow_answers import SLOW

from roll_r3.config.rewards import RewardConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards import reward_process as process
from roll_r3.rewards.scoring import Answer, Rewards
from roll_r3.rewards.truths import Truth

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

__all__ = ["rewards"]


def test_a_rule_reads_test_cases_from_its_row(rewards: Open) -> None:
    row = {"tests": [{"above": 1}, {"above": 5}], "other": "x" * 1000}
    messages = ({"role": "user", "content": "a number"},)
    found = rewards("reward_rules:passes_tests")
    scores = found.score(
        [
            asked("3", row=row, messages=messages),
            asked("7", row=row, messages=messages),
            asked("7", row=row, messages=messages, finish_reason="length"),
        ]
    ).scores
    assert scores == [0.5, 1.0, 0.0]


def test_only_requested_values_are_sent(rewards: Open) -> None:
    found = rewards("reward_rules:passes_tests", workers=1)
    sent = []
    (one,) = found._processes._processes
    send = one.pipe.send
    one.pipe.send = lambda message: (sent.append(message), send(message))
    found.score([asked("3", row={"tests": [{"above": 1}]}, messages=[{"role": "user", "content": ""}], prompt="long")])
    ((_, _, values),) = sent
    assert set(values) == {"response", "row", "messages", "finish_reason"}


def test_an_impossible_call_stops_the_start_with_every_reason(rewards: Open) -> None:
    with pytest.raises(ConfigError) as refused:
        rewards("reward_rules:needs_more", kwargs={"prompt": "x", "lettre": "a"})
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "rewards.mine.kwargs.prompt",
        "rewards.mine.reward",
        "rewards.mine.kwargs.lettre",
    ]
    assert "its parameter 'letter'" in lines[1]
    assert "offered are response, ground_truth, domain, prompt, messages, row" in lines[1]


@pytest.mark.parametrize("how", ["returns", "exits", "raises"])
def test_a_fork_of_a_rule_answers_nothing(rewards: Open, how: str) -> None:
    found = rewards("reward_rules:forks", kwargs={"how": how})
    processes = {one._process.pid for one in found._processes._processes if one._process}
    numbers = [float(i) for i in range(60)]
    assert score(found, *map(str, numbers)) == numbers
    children = [child for pid in processes for child in psutil.Process(pid).children()]
    assert all(ended(child.pid) for child in children), "no fork keeps serving"
    assert {one._process.pid for one in found._processes._processes if one._process} == processes


def test_math_gives_up_in_time_and_scores_0(rewards: Open) -> None:
    found = rewards("math", max_failed=0.0, timeout=0.5)
    texts = [SLOW[name] for name in ("tower", "ones", "set of 1000", "factorial", "nested fractions", "parentheses")]
    right = asked(r"so \boxed{\$18}", r"\$18")
    wrong = asked(r"so \boxed{\$19}", r"\$18")
    scored = found.score([right, wrong, *[asked(text, "18") for text in texts], right])
    assert scored.scores == [1.0, 0.0, *[0.0] * len(texts), 1.0]
    assert (scored.failed, scored.why) == (0, "")
    assert 4 <= scored.undecided <= len(texts)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("sum(range(10**14))", "killed its process (SIGXCPU)"),  # C that looks at no signal
        ("os.kill(os.getpid(), 9)", "killed its process (SIGKILL: the kernel does this when memory runs out)"),
        ("os._exit(7)", "ended its process (exit code 7)"),
    ],
)
def test_math_scores_0_where_its_process_is_killed(
    rewards: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    does: str,
    said: str,
) -> None:
    (tmp_path / "math_verify.py").write_text(
        f"import os\ndef parse(text, **_):\n    if 'odd' in text:\n        {does}\n    return [text]\n"
        "def verify(truth, answer, **_): return '7' in answer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = rewards("math", max_failed=0.0, timeout=0.2, workers=1)
    scored = found.score([asked("7", "7"), asked("odd", "7"), asked("7", "7")])
    assert (scored.scores, scored.undecided) == ([1.0, 0.0, 1.0], 1)
    assert f"rewards.mine (math) {said} for the response 'odd' (ground truth '7'); it scores 0" in caplog.text


def test_ground_truths_without_a_match_stop_the_start(rewards: Open, caplog: pytest.LogCaptureFixture) -> None:
    found = rewards("math")
    found.check_truths([Truth(f"rows-{i}", "default", str(i)) for i in range(40)] + [Truth("rows-40", "x", r"\$18")])
    lost = [Truth(f"rows-{i}", "default", "" if i % 2 else "\x1b[31m$ $") for i in range(7)]
    with pytest.raises(ConfigError) as refused:
        found.check_truths([Truth("rows-7", "default", "18"), *lost])
    assert str(refused.value).startswith(
        "rewards.mine (math): 7 of 8 ground truths can never be matched, so no response to their prompts gets a "
        "reward: '\\\\x1b[31m$ $' of row rows-0 cannot be parsed by math-verify; '' of row rows-1 cannot be parsed"
    )
    assert "and 2 more, listed in logs/driver.log" in str(refused.value)
    assert caplog.text.count("can never be matched") == 7
    assert score(found, "18") == [0.0]


def test_rules_that_compare_text_take_any_ground_truth(tmp_path: Path) -> None:
    rules = {"default": RewardConfig(reward="exact_match")}
    with Rewards(rules, workers=1, max_failed=0.1, log_dir=tmp_path) as found:
        found.wait_until_ready()
        found.check_truths([Truth("rows-0", "default", "")])


def test_rays_variables_are_kept_from_rules(rewards: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1")
    monkeypatch.setenv("RAY_ADDRESS", "2")
    found = rewards(workers=1)
    names = ("RAY_AUTH_TOKEN", "RAY_ADDRESS")
    assert score(found, *[f"environment {name}" for name in names]) == [None, None]
    assert score(found, "exit 3") == [None]
    assert score(found, *[f"environment {name}" for name in names]) == [None, None], "nor has the next one them"


def test_the_kernel_ends_a_rule_first_where_memory_runs_out(rewards: Open) -> None:
    assert score(rewards(workers=1), "oom") == [1000.0]


def test_the_first_call_of_a_rule_may_import(rewards: Open) -> None:
    found = rewards("reward_rules:imports_late", timeout=0.3, kwargs={"seconds": 1.0}, workers=1)
    assert score(found, "1", "2", "3") == [1.0, 2.0, 3.0]
    assert score(found, "exit", "5", "6") == [None, 5.0, 6.0], "and so may that of the next process"
    began = time.monotonic()
    assert score(found, "loop", "8") == [None, 8.0]
    assert score(found, "exit", "loop", "9") == [None, None, 9.0]
    assert time.monotonic() - began < 20, "no response is waited for as for a start"


def test_errors_of_a_rule_are_escaped(rewards: Open, caplog: pytest.LogCaptureFixture) -> None:
    scored = rewards(workers=1).score([asked("raise \x1b[31mred \u202e"), asked("1")])
    assert scored.why == f"rewards.mine ({MISBEHAVES}) raised ValueError: \\x1b[31mred \\u202e".rstrip()
    assert "\x1b" not in caplog.text


COUNTS = """
import os, signal
from pathlib import Path
starts = Path(__file__).with_name("starts")
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
if len(starts.read_text()) in {deadly}:
    os.kill(os.getpid(), signal.SIGKILL)
def score(response, ground_truth):
    if response == "exit":
        os._exit(3)
    return float(response)
"""


def test_a_process_killed_during_its_import_is_restarted_again(
    rewards: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed_twice.py").write_text(COUNTS.format(deadly=(2, 3)))
    (tmp_path / "killed_for_good.py").write_text(COUNTS.format(deadly="range(2, 99)").replace('"starts"', '"others"'))
    monkeypatch.syspath_prepend(tmp_path)
    assert score(rewards("killed_twice:score", workers=1), "1", "exit", "2") == [1.0, None, 2.0]
    found = rewards("killed_for_good:score", workers=1)
    with pytest.raises(RollError, match="imported the rules before, but 3 starts in a row failed") as stopped:
        score(found, "1", "exit", "2")
    assert not isinstance(stopped.value, ConfigError), "the configuration is not what is wrong"
    assert (tmp_path / "others").read_text() == "xxxx"


def test_a_process_that_reads_nothing_is_restarted(
    rewards: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "_PIPE_TIMEOUT_S", 1)
    found = rewards("reward_rules:passes_tests", workers=1)
    case = asked("3", row={"tests": [{"above": 1}], "long": "x" * (4 << 20)}, messages=[{"role": "", "content": ""}])
    assert found.score([case]).scores == [1.0]
    (one,) = found._processes._processes
    assert one._process is not None
    os.kill(one._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert found.score([case, case]).scores == [1.0, 1.0]
    assert time.monotonic() - began < 15
    assert "did not accept a response within 1 s" in caplog.text


def test_a_log_keeps_its_newest_part(rewards: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 1 << 20)
    found = rewards(workers=1)
    for _ in range(6):
        assert score(found, "print 400000") == [1.0]
    assert score(found, "raise the newest", "1") == [None, 1.0]
    log = tmp_path / "rewards-0.log"
    assert log.stat().st_size < 2 << 20
    assert "[earlier output was removed]" in log.read_text()
    assert re.search("ValueError: the newest", log.read_text())


def test_an_unexpected_message_is_ignored(rewards: Open, caplog: pytest.LogCaptureFixture) -> None:
    """A score is accepted with the number of its task only."""
    found = rewards(workers=1)
    (one,) = found._processes._processes
    give = one.give

    def after_another(index: int, task: process.Task) -> bool:
        given = give(index, task)
        assert one._take(one._tasks - 1, "score", 1000.0) is None
        return given

    one.give = after_another  # type: ignore[method-assign]
    assert score(found, "1", "2") == [1.0, 2.0]
    assert caplog.text.count("sent an unexpected message") == 2


def test_responses_are_scored_while_others_are_still_made(rewards: Open) -> None:
    found = rewards(workers=2)
    slow, quick = found.begin([asked("seconds 0.8")]), found.begin([asked("1"), asked("2")])
    assert [answer.score for answer in quick.result()] == [1.0, 2.0]
    assert not slow.done()
    later = [found.begin([asked(f"{i}.{j}") for j in range(3)]) for i in range(5)]
    assert [[answer.score for answer in each.result()] for each in later] == [
        [float(f"{i}.{j}") for j in range(3)] for i in range(5)
    ]
    assert not slow.done()
    assert [answer.score for answer in slow.result()] == [0.8]
    assert found.begin([]).result() == []


def test_answers_tell_what_each_response_got(rewards: Open, caplog: pytest.LogCaptureFixture) -> None:
    found = rewards(max_failed=0.5)
    responses = [asked("1"), asked("raise it"), asked("2")]
    answers = found.begin(responses).result()
    assert answers == [
        Answer(1.0, {"mine": 1.0}),
        Answer(None, {}, f"rewards.mine ({MISBEHAVES}) raised ValueError: it"),
        Answer(2.0, {"mine": 2.0}),
    ]
    assert not caplog.records, "accept logs them, once"
    scores = found.accept(responses, answers)
    assert (scores.scores, scores.failed, scores.by_rule) == ([1.0, None, 2.0], 1, {"mine": 1.5})
    assert len(caplog.records) == 1
    with pytest.raises(RollError, match="1 of the step's 1 responses"):
        found.accept(responses[1:2], answers[1:2])


def test_a_step_ends_early_once_too_many_have_failed(rewards: Open) -> None:
    found = rewards(workers=1, max_failed=0.2)
    asks = [asked(text) for text in ("1", "raise it", "seconds 0.8", "2")]
    groups = [([each], found.begin([each])) for each in asks]
    answers = found.wait_for(groups)
    assert [(answer.score, answer.why != "") for answer in answers] == [(1, False), (None, True), *[(None, False)] * 2]
    with pytest.raises(RollError, match=r"^1 of the step's 4 responses"):
        found.accept(asks, answers)
    assert groups[3][1].cancelled(), "nobody waits for it"


def test_a_cancelled_call_leaves_out_what_has_not_begun(rewards: Open, tmp_path: Path) -> None:
    found = rewards(workers=1)
    first, second = found.begin([asked("seconds 0.5")]), found.begin([asked("seconds 0.9")] * 50)
    assert second.cancel()
    began = time.monotonic()
    assert score(found, "3") == [3.0]
    assert first.done()
    assert time.monotonic() - began < 5


def test_several_rules_of_a_domain_are_summed_with_their_weights(tmp_path: Path) -> None:
    rules = {
        "exact": RewardConfig(reward="exact_match", weight=2.0, tag_included=("x",)),
        "number": RewardConfig(reward=MISBEHAVES, weight=-0.5, tag_included=("x", "y")),
        "math": RewardConfig(reward="math", tag_included=("z",), timeout=0.5),
        "length": RewardConfig(reward=MISBEHAVES, kwargs={}, tag_included=("z",), weight=0.0),
        "watched": RewardConfig(reward="exact_match"),
        "also": RewardConfig(reward="exact_match", weight=0.5),
    }
    with Rewards(rules, workers=2, max_failed=1.0, log_dir=tmp_path) as found:
        found.wait_until_ready()
        found.check_truths([Truth("0", "x", ""), Truth("1", "z", "4")])
        with pytest.raises(ConfigError, match=r"rewards.math \(math\): 1 of 1 ground truths"):
            found.check_truths([Truth("0", "x", ""), Truth("1", "z", "")])
        scored = found.score(
            [
                asked("3", "3", "x"),
                asked("3", "4", "x"),
                asked("5", "5", "y"),
                asked("quit", "quit", "x"),
                asked("4", "4", "z"),
                asked("a", "a", "another"),
            ]
        )
    assert scored.scores == [0.5, -1.5, -2.5, None, 1.0, 1.5]
    assert scored.by_rule == {"exact": 2 / 3, "number": 11 / 3, "math": 1.0, "length": 4.0, "watched": 1.0, "also": 1.0}
    assert scored.why == f"rewards.number ({MISBEHAVES}) raised SystemExit: enough"


def test_built_in_rules_read_their_row(rewards: Open) -> None:
    """Each in its process, with its check of the rows."""
    tests = {"case_type": "assert", "test_cases": ["assert f() == 1"]}
    found = rewards("code", timeout=10, kwargs={"reward_type": "share"})
    assert found.score([asked("def f(): return 1", row=tests), asked("def f(): return 2", row=tests)]).scores == [1, 0]
    found.check_truths([Truth("rows-0", "default", "", tests)])
    with pytest.raises(
        ConfigError, match=r"1 of 2 ground truths can never be matched.* of row rows-1 raised ValueError"
    ):
        found.check_truths([Truth("rows-0", "default", "", tests), Truth("rows-1", "default", "", {})])
    found = rewards("ifeval", kwargs={"reward_type": "soft"})
    row = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}]}
    assert found.score([asked("a, b", row=row), asked("ab", row=row)]).scores == [0.5, 1.0]
    with pytest.raises(ConfigError, match="of row rows-1 raised ValueError: the ground truth must be JSON"):
        found.check_truths([Truth("rows-0", "default", "", row), Truth("rows-1", "default", "", {})])
    found = rewards("multiple_choice", kwargs={"response_length_penalty_coef": 1.0})
    assert found.score([asked(r"\boxed{C}", "C", num_response_tokens=250)]).scores == [0.75]
    with pytest.raises(ConfigError, match="of row rows-1 raised ValueError: a choice must begin with a capital letter"):
        found.check_truths([Truth("rows-0", "default", "A"), Truth("rows-1", "default", "a")])
    with pytest.raises(ConfigError, match="1 of 2 ground truths can never be matched"):  # files may share a name
        found.check_truths([Truth("rows-0", "default", "a"), Truth("rows-0", "default", "A")])
