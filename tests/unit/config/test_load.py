"""From a file and overrides to a configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from roll_r3.config.findings.report import InvalidConfigError
from roll_r3.config.load import MAX_BYTES, load
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.config.rules.example import MINIMAL
from roll_r3.errors import ConfigError
from tests.unit.config.conftest import only


def test_a_file_and_its_defaults(load_text):
    config = load_text().config
    assert config.samples_per_step == 64
    assert config.actor_train.router_replay.mode == "R3"
    assert config.reference is None


def test_overrides_are_read_as_yaml_and_the_last_one_wins(load_text):
    config = load_text(
        MINIMAL,
        "seed=7",
        "seed=8",
        "actor_train.training_args.learning_rate=1e-5",
        "actor_train.device_mapping=[4, 5, 6]",
        "actor_train.device_mapping.1=9",
        "actor_infer.generating_args={top_k: 5}",
        "reference.device_mapping=list(range(0,4,2))",
        "rewards.default={reward: math, tag_included: [a]}",
        "actor_train.data_args.file_name=a=b.jsonl",
    ).config
    assert config.seed == 8
    assert config.actor_train.training_args.learning_rate == 1e-5
    assert config.actor_train.device_mapping == (4, 9, 6)
    assert config.actor_infer.generating_args.top_k == 5
    assert config.reference is not None
    assert config.reference.device_mapping == (0, 2)
    assert config.rewards["default"].tag_included == ("a",)
    assert config.actor_train.data_args.file_name == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not an override"),
        ("=3", "not an override"),
        ("a..b=3", "not an override"),
        ("seed =3", "not an override"),
        ("actor_train.data_args.file_name.x=3", "is a value, not a section"),
        ("actor_train.device_mapping.3=3", "list of 2 items"),
        ("actor_train.device_mapping.x=3", "list of 2 items"),
        ("seed=[1", "not YAML"),
        ("seed=!!python/object/apply:os.getcwd []", "tag"),
        ("rewards={a: 1, a: 2}", "given twice"),
    ],
)
def test_a_wrong_override_is_named(load_text, override, message):
    finding = only(load_text, MINIMAL, "actor_train.device_mapping=[0, 1]", override)
    assert message in finding.why


@pytest.mark.parametrize(
    ("written", "mode"),
    [
        ("off", "disable"),
        ("no", "disable"),
        ("false", "disable"),
        ("disable", "disable"),
        ('"off"', "disable"),
        ("r3", "R3"),
        ("R2", "R2"),
    ],
)
def test_ways_to_write_a_replay_mode(load_text, written, mode):
    assert load_text(MINIMAL, f"actor_train.router_replay.mode={written}").config.actor_train.router_replay.mode == mode


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"exp_name: \xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path / "large.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(name)
    if os.geteuid():
        (tmp_path / "locked.yaml").touch(mode=0)
        with pytest.raises(ConfigError, match="cannot be read"):
            load(tmp_path / "locked.yaml")


def test_what_is_printed_loads_to_the_same(load_text, tmp_path):
    strategy = "{strategy_name: megatron_train, strategy_config: {moe_router_dtype: null}}"
    config = load_text(MINIMAL, f"actor_train.strategy_args={strategy}", "exp_name='1e5'").config
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "printed.yaml").config == config


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)

_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)

_PATHS = st.sampled_from(
    [
        "exp_name",
        "seed",
        "pg_clip",
        "actor_train",
        "actor_train.device_mapping",
        "actor_train.router_replay.mode",
        "actor_train.strategy_args",
        "actor_infer.strategy_args.strategy_config.server_args",
        "actor_train.data_args.file_name",
        "rewards",
        "rewards.default.kwargs.x",
        "reference",
        "track_with.0",
    ]
)


@given(path=_PATHS, value=_VALUES)
def test_any_value_anywhere_loads_or_is_reported(tmp_path_factory, path, value):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(MINIMAL)
    text = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .removesuffix("...\n")
        .rstrip("\n")
    )
    try:
        load(file, [f"{path}={text}"])
    except InvalidConfigError as error:
        refusal = error
    else:
        return
    assert refusal.findings
    assert all(finding.why for finding in refusal.findings)


def test_importing_the_configuration_brings_in_no_engine():
    code = (
        "import sys, roll_r3.run, roll_r3.config.load, roll_r3.config.docs, roll_r3.preflight.check\n"
        "heavy = {'torch', 'ray', 'transformers', 'sglang', 'megatron', 'mbridge', 'vllm', 'omegaconf', 'pyarrow'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_every_shipped_configuration_loads():
    files = sorted((Path(__file__).parents[3] / "configs").glob("**/*.yaml"))
    assert files
    for file in files:
        load(file)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "override", ["actor_train.device_mapping." + "9" * 5000 + "=1", "a." * 3000 + "b=1"], ids=["number", "depth"]
)
def test_an_override_that_leads_nowhere_is_named(load_text, override):
    with pytest.raises(InvalidConfigError) as refused:
        load_text(MINIMAL, "actor_train.device_mapping=[0]", override)
    assert len(str(refused.value)) < 1000


def test_an_item_far_beyond_a_list_is_not_resolved(load_text):
    assert "cannot be resolved" in only(load_text, MINIMAL + "seed: ${actor_train.x." + "9" * 5000 + "}").why


@pytest.mark.timeout(60)
def test_a_file_of_many_values_is_left_early(load_text):
    """Composing half a million nodes takes minutes and a gigabyte."""
    assert "more than" in only(load_text, "a: [" + "1," * 500_000 + "]").why


def test_a_key_that_a_terminal_obeys_is_shown_as_it_is_written(load_text):
    with pytest.raises(InvalidConfigError, match=r"\\x1b\[2J\\n = 1") as refused:
        load_text(MINIMAL + '"\\e[2J\\n": 1\n')
    assert all(line.isprintable() for line in str(refused.value).split("\n"))


def test_a_file_for_roll_needs_a_translator(load_text):
    finding = only(load_text, f"dialect: roll\n{MINIMAL}")
    assert (finding.rule, finding.found) == ("bad-value", (("dialect", "roll"),))
    assert "--print-config" in finding.fix
    assert load_text(f"dialect: roll_r3\n{MINIMAL}").config == load_text(MINIMAL).config


def test_a_key_of_rolls_is_unknown_without_a_translator(load_text):
    assert only(load_text, f"{MINIMAL}hydra: {{}}\n").rule == "unknown-field"


def test_loading_does_not_import_the_translation_of_rolls_files():
    code = "import sys, roll_r3.config.load, roll_r3.preflight.check; sys.exit('roll_r3.from_roll' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
