"""Reward functions, found and checked without executing their source."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from roll_r3.config.rewards import RewardConfig
from roll_r3.preflight import reward_functions
from roll_r3.preflight.reward_functions import missing_keys, reward_problems


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a package that exits when it is executed, on the import path."""
    folder = tmp_path / "some_rewards"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('it was run')\n")
    (folder / "rules.py").write_text(
        "raise SystemExit('it was run')\n"
        "def score(response, truth): ...\n"
        "alias = score\n"
        "from math import sqrt as root\n"
        "if root:\n    def branch(response, truth): ...\n"
        "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    def tried(response, truth): ...\n"
        "with open('x') as opened:\n    def within(response, truth): ...\n"
        "match root:\n    case 1:\n        matched = 1\n"
        "def outer(response, truth):\n    def inner(response, truth): ...\n"
        "class Holder:\n    def method(self, truth): ...\n    field = 1\n"
        "squares = [number for number in range(3)]\n"
        "def local(response):\n    score = 1\n    return score\n"
    )
    (folder / "broken.py").write_text("def (\n")
    (folder / "star.py").write_text("from os.path import *\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_module_with_a_long_expression_is_read(package):
    (package / "long.py").write_text(f"text = {' + '.join(['a'] * 1500)}\ndef score(response, ground_truth): ...\n")
    assert list(reward_problems({"mine": RewardConfig(reward="some_rewards.long:score")})) == []


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("some_rewards.rules:score", None),
        ("some_rewards.rules:alias", None),
        ("some_rewards.rules:root", None),
        ("some_rewards.rules:branch", None),
        ("some_rewards.rules:tried", None),
        ("some_rewards.rules:opened", None),
        ("some_rewards.rules:within", None),
        ("some_rewards.rules:matched", None),
        ("some_rewards.rules:Holder", None),
        ("some_rewards.rules:inner", "defines no inner"),
        ("some_rewards.rules:method", "defines no method"),
        ("some_rewards.rules:field", "defines no field"),
        ("some_rewards.rules:number", "defines no number"),
        ("some_rewards.rules:scores", "defines no scores"),
        ("some_rewards.nothing:score", "no module some_rewards.nothing"),
        ("some_rewards.rules.deeper:score", "no module some_rewards.rules.deeper"),
        ("no_such_rewards:score", "no module no_such_rewards"),
        ("some_rewards.broken:score", "cannot be read"),
        ("some_rewards.star:join", None),
        ("math:sqrt", None),
        ("roll_r3.rewards.rules:exact_match", None),
        ("exact_match", None),
        ("not a function", None),
    ],
)
def test_a_reward_function_is_found_without_being_imported(package, reward, message):
    problems = list(reward_problems({"mine": RewardConfig(reward=reward)}))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]
    assert not any(name.startswith("some_rewards") for name in sys.modules)


def test_a_module_without_a_spec_is_not_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    [problem] = reward_problems({"mine": RewardConfig(reward="made_by_hand:score")})
    assert "no module made_by_hand" in problem


@pytest.mark.parametrize("made", [(), ("outer",), ("outer", "outer/inner")])
def test_folders_without_init_are_packages(made, monkeypatch, tmp_path):
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    for name in made:
        (tmp_path / name / "__init__.py").touch()
    (folder / "rules.py").write_text("def score(response, truth): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"there": "outer.inner.rules:score", "lacking": "outer.inner.nothing:score"}
    problems = list(reward_problems({name: RewardConfig(reward=reward) for name, reward in names.items()}))
    assert len(problems) == 1
    assert "no module outer.inner.nothing" in problems[0]
    assert "outer" not in sys.modules


@pytest.mark.parametrize(
    ("parameters", "kwargs", "message"),
    [
        ("response, truth", {}, None),
        ("response, truth", {"letter": "a"}, "kwargs.letter: the function has no parameter of this name"),
        ("response", {}, None),
        ("response, row, messages", {}, None),
        ("response, row", {"row": 1}, "kwargs.row: the name is reserved for an offered value"),
        ("response, truth, letter", {}, "its parameter 'letter' has no default"),
        ("response, truth, letter", {"letter": "a"}, None),
        ("response, truth, letter='a'", {}, None),
        ("response, truth, letter, other='a'", {"other": "b"}, "its parameter 'letter' has no default"),
        ("response, truth, *, letter", {}, "its parameter 'letter' has no default"),
        ("response, truth, *, letter=None", {}, None),
        ("*args, **kwargs", {"letter": "a"}, None),
        ("response, truth, /, **kwargs", {"truth": "a"}, None),
        ("response, truth, **kwargs", {"truth": "a"}, None),
    ],
)
def test_a_reward_function_accepts_its_arguments(package, parameters, kwargs, message):
    (package / "own.py").write_text(f"def score({parameters}): ...\n")
    problems = list(reward_problems({"mine": RewardConfig(reward="some_rewards.own:score", kwargs=kwargs)}))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_a_function_that_only_an_import_can_resolve_is_not_judged(package):
    (package / "own.py").write_text(
        "@given\ndef decorated(): ...\nif 1:\n    def twice(response, truth): ...\nelse:\n    def twice(): ...\n"
    )
    names = ("decorated", "twice")
    assert not list(reward_problems({name: RewardConfig(reward=f"some_rewards.own:{name}") for name in names}))


def test_the_built_in_rewards(monkeypatch):
    for name in ("exact_match", "math"):
        [problem] = reward_problems({"mine": RewardConfig(reward=name, kwargs={"letter": "a"})})
        assert problem == f"{name}: kwargs.letter: the function has no parameter of this name"
    monkeypatch.setattr(reward_functions, "distributions", lambda name: [name] if name == "math-verify" else [])
    assert not list(reward_problems({"mine": RewardConfig(reward="math")}))
    monkeypatch.setattr(reward_functions, "distributions", lambda name: [])
    assert "math-verify" in next(reward_problems({"mine": RewardConfig(reward="math")}))
    assert not list(reward_problems({"mine": RewardConfig(reward="exact_match")}))


def test_a_judge_needs_its_key(monkeypatch):
    def judged(name):
        judge = {"base_url": "http://a/v1", "model": "m", "api_key_env": name}
        return {"mine": RewardConfig(reward="llm_judge", judge=judge)}

    monkeypatch.setenv("JUDGE_KEY", "x")
    monkeypatch.delenv("OTHER_KEY", raising=False)
    assert list(missing_keys(judged("JUDGE_KEY"), {})) == []
    assert list(missing_keys(judged(None), {})) == []
    assert list(missing_keys(judged("sk-a-key-itself"), {})) == []
    assert list(missing_keys(judged("OTHER_KEY"), {"OTHER_KEY": "y"})) == []
    assert list(missing_keys(judged("OTHER_KEY"), {"JUDGE_KEY": "y"})) == ["OTHER_KEY"]
    assert not list(reward_problems(judged("OTHER_KEY")))


def test_arguments_of_built_in_rules_are_those_of_their_functions():
    rules = {"code": {"seconds": 1}, "ifeval": {"reward_type": "soft"}, "multiple_choice": {"repetition_penalty": 0.5}}
    assert not list(reward_problems({n: RewardConfig(reward=n, kwargs=kwargs) for n, kwargs in rules.items()}))
    [problem] = reward_problems({"mine": RewardConfig(reward="code", kwargs={"second": 1})})
    assert problem == "code: kwargs.second: the function has no parameter of this name"
