"""Choice of the rule, and valid scores; tests/integration/test_reward_faults.py tests the processes."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roll_r3.config.rewards import BUILT_IN_REWARDS, JUDGE, RewardConfig
from roll_r3.errors import ConfigError
from roll_r3.rewards.rules import BUILT_IN, Rule, as_score
from roll_r3.rewards.scoring import Rewards


def test_the_rules_are_those_that_a_check_knows() -> None:
    assert {*BUILT_IN, JUDGE} == BUILT_IN_REWARDS


def find(reward: str) -> Any:
    return Rule("mine", reward, {}, 1.0).find()


def test_built_in_rules() -> None:
    exact, math = find("exact_match"), find("math")
    assert (exact(" 4\n", "4"), exact("5", "4")) == (1, 0)
    assert math(r"so the answer is $\frac{1}{2}$", "0.5") == 1
    assert math(r"so the answer is $\frac{1}{3}$", "0.5") == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nothing", "'nothing' is neither code, exact_match, ifeval, math, multiple_choice nor"),
        ("no.such.module:f", "cannot import"),
        ("math:no_such", "cannot import"),
        ("math:pi", "not a function"),
    ],
)
def test_a_missing_function_is_named(reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"rewards.mine.reward: .*{message}|rewards.mine.reward: {message}"):
        find(reward)


@pytest.mark.parametrize(
    "value", [1, True, 0.1, np.float32(0.1), np.int64(3), np.bool_(True), torch.tensor(0.1), Decimal("0.5")]
)
def test_a_number_of_any_kind_is_a_score(value: Any) -> None:
    assert type(as_score(value)) is float
    assert as_score(value) == float(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must return a number, returned None"),
        ("1.0", "must return a number, returned a str"),
        ([1.0], "must return a number, returned a list"),
        (1j, "must return a number, returned a complex"),
        (float("nan"), "must return a finite number, returned nan"),
        (np.float32("inf"), "must return a finite number, returned inf"),
    ],
)
def test_a_score_must_be_a_finite_number(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_score(value)


def rewards_of(**rewards: Any) -> Rewards:
    rules = {name: RewardConfig(**fields) for name, fields in rewards.items()}
    return Rewards(rules, workers=4, max_failed=0.1, log_dir=Path("no/such/place"))


def test_a_domain_without_a_rule_is_named() -> None:
    with pytest.raises(ConfigError, match="no rule scores the domains code"):
        rewards_of(a={"reward": "math", "tag_included": ("math",)}).check_domains({"math", "code"})
    rewards_of(a={"reward": "math", "tag_included": ("math",)}, b={"reward": "math"}).check_domains({"math", "code"})


def test_each_domain_has_its_own_text() -> None:
    found = rewards_of(a={"reward": "math", "tag_included": ("x",), "skip_special_tokens": False}, b={"reward": "math"})
    assert (found.skips_special_tokens("x"), found.skips_special_tokens("y")) == (False, True)


def test_time_limits() -> None:
    limits = [
        RewardConfig(**fields).time_limit for fields in ({"reward": "math"}, {"reward": "code"}, {"reward": "a:b"})
    ]
    assert limits == [2.0, 120.0, 30.0]
    assert RewardConfig(reward="math", timeout=7).time_limit == 7


def test_a_line_lists_the_domains_of_each_rule() -> None:
    """Domains without a rule of their own are listed separately."""
    rewards = rewards_of(a={"reward": "exact_match", "tag_included": ("x", "y")}, rest={"reward": "math"})
    assert rewards.shares({"x": 3, "y": 1000, "code": 2}) == (
        "rewards: a (exact_match) scores 1,003 prompts [y 1,000, x 3], "
        "rest (math) scores 2 prompts [without a rule of their own: code 2]"
    )
    assert rewards.shares({"x": 1}).endswith("rest (math) scores 0 prompts")
    many = rewards.shares({f"d{i}": 20 - i for i in range(10)})
    assert "scores 155 prompts [" in many
    assert many.endswith(
        " [without a rule of their own: d0 20, d1 19, d2 18, d3 17, d4 16, d5 15, d6 14, d7 13, 2 more]"
    )
    plain = rewards_of(default={"reward": "exact_match"})
    assert plain.shares({"default": 7}) == "rewards: default (exact_match) scores 7 prompts"


def test_a_line_names_weights_and_the_prompts_with_several_rules() -> None:
    rewards = rewards_of(
        a={"reward": "math", "tag_included": ("x",)},
        b={"reward": "exact_match", "tag_included": ("x", "y"), "weight": 0.5},
    )
    assert rewards.shares({"x": 3, "y": 2}) == (
        "rewards: a (math) scores 3 prompts [x 3], b (exact_match, weight 0.5) scores 5 prompts [x 3, y 2]; 3 prompts "
        "have several rules, and the weighted sum as score"
    )
    assert (rewards.section_of("x"), rewards.section_of("y")) == ("a", "b")
