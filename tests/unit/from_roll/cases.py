"""Cases and helpers shared by the tests of ROLL's files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from roll_r3.config import load
from roll_r3.config.findings.report import ABSENT
from roll_r3.config.reading.interpolate import resolve
from roll_r3.config.reading.yaml_file import parse_yaml
from roll_r3.from_roll.includes import include_defaults
from roll_r3.from_roll.roll_dialect import ROLL
from roll_r3.from_roll.tables import ALL_ROWS
from roll_r3.from_roll.translate import translate

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent / "files"
FILES = sorted(FOLDER.glob("*.yaml"))
KEYS = sorted({key for row in ALL_ROWS for key in row.keys})
ENGINE = "actor_infer.strategy_args.strategy_config"
LAYOUT = "actor_train.strategy_args.strategy_config"
MATH = "roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker"
NAMES = {
    "<role>": "actor_train",
    "<trainer>": "reference",
    "<fsdp2>": "actor_train",
    "<engine>": "actor_infer",
    "<sglang>": "actor_infer",
    "<vllm>": "actor_infer",
    "*": "math_rule",
}
"""Part of a pattern -> one of its names."""
STRATEGIES = {"<trainer>": "megatron_infer", "<fsdp2>": "fsdp2_train", "<sglang>": "sglang", "<vllm>": "vllm"}
"""Part of a pattern -> strategy required for its role."""

load_text = partial(load.load_text, translator=ROLL)
"""`roll_r3.config.load.load_text`, for files of ROLL too."""

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a file before translation, and its places."""
    parsed = parse_yaml(path.read_text(), path.name)
    data, places, findings = include_defaults(parsed.value, parsed.places)
    assert not parsed.findings
    assert not findings
    data, unresolved = resolve(data, places)
    assert not unresolved
    return data, places


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return `data` with a value set, or removed if it is ABSENT."""
    data = copy.deepcopy(data)
    *above, last = path.split(".")
    node = data
    for key in above:
        node = node.setdefault(key, {})
    node.pop(last, None)
    if value is not ABSENT:
        node[last] = value
    return data


def at(data: dict[str, Any], path: str) -> Any:
    """Return the value at a path, ABSENT if there is none."""
    node: Any = data
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return ABSENT
        node = node[key]
    return node


def of_roll(**changes: Any) -> dict[str, Any]:
    """Return a small file of ROLL; `__` in a name stands for a dot."""
    data: dict[str, Any] = {
        "exp_name": "small",
        "pretrain": "some/checkpoint",
        "adv_estimator": "grpo",
        "num_return_sequences_in_group": 8,
        "actor_train": {
            "data_args": {"file_name": "a.jsonl", "messages": "messages", "domain_interleave_probs": {"math_rule": 1.0}}
        },
        "actor_infer": {"generating_args": {"temperature": 1.0, "top_p": 1.0, "top_k": -1}},
        "rewards": {"math_rule": {"worker_cls": MATH}},
    }
    for name, value in changes.items():
        data = put(data, name.replace("__", "."), value)
    return data


def run(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Return the translated tree, and the paths named by each rule."""
    translated, _, findings = translate(data, {})
    named: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        named[finding.rule] = named.get(finding.rule, ()) + tuple(path for path, _ in finding.found)
    return translated, named


def concrete(pattern: str) -> str:
    """Return one path matched by a row's pattern."""
    return ".".join(NAMES.get(part, part) for part in pattern.split("."))


def for_pattern(data: dict[str, Any], pattern: str) -> dict[str, Any]:
    """Return `data` with a strategy under which `concrete(pattern)` matches the pattern."""
    first = pattern.partition(".")[0]
    return put(data, f"{NAMES[first]}.strategy_args.strategy_name", STRATEGIES[first]) if first in STRATEGIES else data
