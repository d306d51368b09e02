"""`key=null` on the command line removes a key, as if it were not in the file."""

from __future__ import annotations

import pytest

from roll_r3.config.findings.report import Finding
from roll_r3.config.load import LoadedConfig, load_text
from roll_r3.config.reading.field_paths import annotations_at, fields_at, members, null_is_a_value
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.tree import join

FILE = (
    MINIMAL.replace("actor_train:\n", "actor_train:\n  training_args: {learning_rate: 1.0e-4, warmup_steps: 3}\n")
    + "use_kl_loss: true\nreference: {device_mapping: [0, 1]}\n"
    + "rewards: {sums: {reward: math, tag_included: [a]}, codes: {reward: 'mine:code'}}\nadvantage_clip: 3.0\n"
)


def loaded(*overrides: str, text: str = FILE) -> LoadedConfig:
    return load_text(text, "run.yaml", overrides)


def only(*overrides: str, text: str = FILE) -> Finding:
    (finding,) = loaded(*overrides, text=text).findings
    return finding


def test_a_field_has_its_default_again():
    config = loaded("actor_train.training_args.learning_rate=null", "advantage_clip=~").config
    assert config.actor_train.training_args.learning_rate == 1e-6
    assert config.actor_train.training_args.warmup_steps == 3
    assert config.advantage_clip is None


def test_a_section_goes_as_a_whole():
    config = loaded("rewards.codes=null", "reference=null", "actor_train.training_args=null").config
    assert list(config.rewards) == ["sums"]
    assert config.reference is None
    assert config.actor_train.training_args.warmup_steps == 0


def test_a_key_that_nobody_knows_can_be_taken_away():
    text = FILE + "of_nobody: {a: 1}\n" + "of_no_one: 3\n"
    assert not loaded("of_nobody=null", "of_no_one=null", text=text).findings
    assert only("of_nobody.a=null", "of_no_one=null", text=text).path == "of_nobody"


def test_later_overrides_start_anew():
    config = loaded("rewards.sums=null", "rewards.sums.reward=exact_match").config
    assert config.rewards["sums"].tag_included == ()
    again = loaded("rewards=null", "rewards.only.reward=math")
    assert list(again.config.rewards) == ["only"]
    assert again.origins.of("rewards.sums.reward") == "default"


@pytest.mark.parametrize("path", ["exp_name", "pretrain", "actor_train"])
def test_what_is_required_cannot_be_taken_away(path):
    finding = only(f"{path}=null")
    assert (finding.rule, finding.path) == ("missing-field", path)


@pytest.mark.parametrize("path", ["advantage_clip", "actor_infer.generating_args.top_p"])
def test_what_is_not_there_is_gone_already(path):
    text = FILE.replace("advantage_clip: 3.0\n", "")
    assert not loaded(f"{path}=null", text=text).findings


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("rewards.summs=null", "rewards has: sums, codes"),
        ("sead=null", "did you mean seed?"),
        ("actor_train.lerning_rate=null", "did you mean actor_train.training_args.learning_rate?"),
        ("reference.device_mapping.0=null", "set the whole list: reference.device_mapping=[...]"),
        ("reference.device_mapping.7=null", "set the whole list: reference.device_mapping=[...]"),
        ("advantage_clip.high=null", "set advantage_clip itself"),
    ],
)
def test_what_cannot_be_taken_away_is_named(override, fix):
    finding = only(override)
    assert (finding.rule, finding.fix) == ("override", fix)


def test_empty_text_takes_nothing_away():
    """It may come from a variable unknown to the shell."""
    assert only("advantage_clip=3", "seed=").rule == "bad-value"


def test_null_in_the_file_is_a_value():
    text = FILE.replace("advantage_clip: 3.0", "advantage_clip: null")
    assert loaded(text=text).config.advantage_clip is None
    assert only(text=FILE.replace("advantage_clip: 3.0", "seed: null")).path == "seed"


def with_null(path: str) -> list[str]:
    fields = [join(path, name) for name in fields_at(path)]
    return [*filter(null_is_a_value, fields), *(found for field in fields for found in with_null(field))]


def test_null_is_set_where_it_is_a_value_of_its_own():
    named = set(with_null(""))
    assert "actor_train.strategy_args.strategy_config.moe_router_dtype" in named
    assert "advantage_clip" not in named, "it is the default"
    assert all(type(None) in [m for a in annotations_at(path) for m in members(a)] for path in named)
    config = loaded("actor_train.strategy_args.strategy_config.moe_router_dtype=null").config
    assert config.actor_train.strategy_args.strategy_config.moe_router_dtype is None
