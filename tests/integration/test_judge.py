"""The reward `llm_judge` against a real local server; test_sglang_rollout.py asks SGLang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer
from reward_processes import asked

from roll_r3.config.judge_prompts import NAMED, placeholders, question
from roll_r3.config.rewards import JudgeConfig, RewardConfig
from roll_r3.errors import ConfigError, RollError
from roll_r3.rewards.judge import chat_client
from roll_r3.rewards.judge.verdicts import read_verdict
from roll_r3.rewards.scoring import Rewards

pytestmark = pytest.mark.integration

KEY = "sk-very-secret"
Judged = Callable[..., Rewards]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def judged(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judged]:
    """Start rewards with one judge, whose question is the response."""
    monkeypatch.setattr(chat_client, "_FIRST_PAUSE_S", 0.02)
    with ExitStack() as stack:

        def opened(max_failed: float = 1.0, others: dict[str, RewardConfig] | None = None, **fields: Any) -> Rewards:
            judge = JudgeConfig(**{"base_url": server.url, "model": "m", "prompt": "{response}", "timeout": 5} | fields)
            rules = {"mine": RewardConfig(reward="llm_judge", judge=judge), **(others or {})}
            found = stack.enter_context(Rewards(rules, workers=1, max_failed=max_failed, log_dir=tmp_path))
            found.wait_until_ready()
            return found

        yield opened


def test_scores_come_from_the_verdicts(judged: Judged, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    rewards = judged(api_key_env="MY_KEY", max_tokens=7, temperature=0.5, extra_body={"top_p": 0.9})
    texts = ["say YES", "say no", "say Not at all", "say", "null x", "plain x"]
    scored = rewards.score([asked(text) for text in texts])
    assert (scored.scores, scored.undecided, scored.failed) == ([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], 3, 0)
    assert scored.by_rule == {"mine": pytest.approx(1 / 3)}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(server.paths) == {"/v1/chat/completions"}
    request = next(r for r in server.requests if r["messages"][0]["content"] == "say YES")
    assert request == {
        "model": "m",
        "messages": [{"role": "user", "content": "say YES"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
    }


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_request_is_repeated_where_that_can_help(judged: Judged, server: JudgeServer, status: int) -> None:
    assert judged(retries=2).score([asked(f"twice {status}")]).scores == [1.0]
    assert server.asked(f"twice {status}") == 3
    assert judged(retries=1).score([asked(f"twice {status} again")]).scores == [None]


def test_a_pause_asked_for_is_kept(judged: Judged) -> None:
    began = time.monotonic()
    assert judged(retries=1).score([asked("later")]).scores == [1.0]
    assert 1 <= time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("text", "requests", "why"),
    [
        ("status 400", 1, "the server answered 400: no: Bearer [key]"),
        ("status 401", 1, "the server answered 401"),
        ("status 500", 2, "the server answered 500: no: Bearer [key], also after 1 repetitions"),
        ("redirect", 1, "the server answered 307"),
        ("slow 3", 2, "no answer within 0.4 s"),
        ("garbage", 2, r"the answer is no chat completion: <html>\x00"),
        ("other", 2, "the answer is no chat completion: {"),
        ("large", 1, "the answer has more than 4194304 bytes"),
        ("hang up", 2, "the connection failed: "),
    ],
)
def test_a_judge_that_fails_costs_its_own_response_only(
    judged: Judged,
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: str,
    requests: int,
    why: str,
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    rewards = judged(api_key_env="MY_KEY", timeout=0.4, retries=1)
    scored = rewards.score([asked("say YES"), asked(text), asked("say NO")])
    assert scored.scores == [1.0, None, 0.0]
    assert scored.why.startswith(f"rewards.mine (llm_judge) gave no verdict: {why}")
    assert server.asked(text) == requests
    assert KEY not in scored.why + caplog.text


def test_too_many_failures_stop_the_step(judged: Judged) -> None:
    with pytest.raises(RollError, match="1 of the step's 2 responses have no reward") as stopped:
        judged(max_failed=0.0, retries=0).score([asked("say YES"), asked("status 500")])
    assert "the server answered 500" in str(stopped.value)


def test_open_requests_are_bounded_over_all_samples(judged: Judged, server: JudgeServer) -> None:
    rewards = judged(max_concurrency=3)
    futures = [rewards.begin([asked(f"slow 0.05{i}{j}") for j in range(4)]) for i in range(5)]
    assert [[answer.score for answer in future.result()] for future in futures] == [[1.0] * 4] * 5
    assert server.most_open == 3
    server.most_open = 0
    judged(max_concurrency=20).score([asked(f"slow 0.5{i}") for i in range(20)])
    assert server.most_open > 10


def test_a_judge_and_a_rule_score_together(judged: Judged) -> None:
    others = {"exact": RewardConfig(reward="exact_match", weight=0.25)}
    rewards = judged(others=others, retries=0)
    answers = rewards.begin([asked("say YES", "say YES"), asked("say no", "say no"), asked("status 500", "")]).result()
    assert [answer.score for answer in answers] == [1.25, 0.25, None]
    assert [dict(answer.parts) for answer in answers] == [
        {"mine": 1.0, "exact": 1.0},
        {"mine": 0.0, "exact": 1.0},
        {"exact": 0.0},
    ]


def test_open_questions_end_with_the_run(judged: Judged, server: JudgeServer, tmp_path: Path) -> None:
    judge = JudgeConfig(base_url=server.url, model="m", prompt="{response}")
    with Rewards({"a": RewardConfig(reward="llm_judge", judge=judge)}, 1, 1.0, tmp_path) as rewards:
        future = rewards.begin([asked("slow 3")])
        time.sleep(0.2)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert future.done()


def test_a_missing_key_stops_the_start(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable MY_KEY is not set"):
        judged(api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("text", "score", "value"),
    [
        ("YES", "yes_no", 1.0),
        ("**No**.", "yes_no", 0.0),
        ("Yes at first, but no", "yes_no", 0.0),
        ("yes</think> I know nothing", "yes_no", None),
        (r"\boxed{3} then \boxed{-7.5 / 10}", "boxed", -7.5),
        (r"\boxed{A}", "boxed", None),
        (r"\boxed{" + "9" * 400 + "}", "boxed", None),
        ("<think>\nThe answer could be no", "yes_no", None),
        ("<think>no</think>\nYES", "yes_no", 1.0),
        ("Score: 1, no, Score: 8.", r"Score: ([0-9.]+)", 8.0),
        ("Score: .", r"Score: ([0-9.]+)", None),
        ("Score: 1e999", r"Score: (\S+)", None),
        ("nothing", r"Score: ([0-9.]+)", None),
    ],
)
def test_verdicts(text: str, score: str, value: float | None) -> None:
    assert read_verdict(text, score) == value


def test_a_pattern_that_backtracks_without_end_decides_nothing() -> None:
    began = time.monotonic()
    assert read_verdict("a" * 40 + "!", r"(a|aa)+$(\d)") is None
    assert time.monotonic() - began < 5


def test_questions() -> None:
    filled = question("{question}{x}{response}|{reference}", prompt="{response}", response="a", ground_truth="b")
    assert filled == "{response}{x}a|b"
    assert all(placeholders(text) == {"prompt", "response", "ground_truth"} for text in NAMED.values())
    assert "YES or NO" in question("match", prompt="1+1=", response="2", ground_truth="2")
    assert question("match", prompt="p", response="r", ground_truth="g") == question(
        "Qwen2.5-7B-Instruct-RLVR-prompt", prompt="p", response="r", ground_truth="g"
    )
