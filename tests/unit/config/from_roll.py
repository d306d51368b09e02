"""What the tests about ROLL's files share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from roll_r3.config.interpolate import resolve
from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml import include_defaults, translate
from roll_r3.config.roll_yaml.translate import TABLES
from roll_r3.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[3]
ROLL = Path(__file__).parent / "roll"
FILES = sorted(ROLL.glob("*.yaml"))
ALL_ROWS = [row for _, rows in TABLES.values() for row in rows]
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
"""Part of a pattern -> one name that it stands for."""
STRATEGIES = {"<trainer>": "megatron_infer", "<fsdp2>": "fsdp2_train", "<sglang>": "sglang", "<vllm>": "vllm"}
"""Part of a pattern -> the strategy that must run that role."""

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file as it is before translation, and its places."""
    parsed = parse_yaml(path.read_text(), path.name)
    data, places, findings = include_defaults(parsed.value, parsed.places)
    assert not parsed.findings
    assert not findings
    data, unresolved = resolve(data, places)
    assert not unresolved
    return data, places


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`data` with a value set, or taken out if it is ABSENT."""
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
    """The value at a path, ABSENT if there is none."""
    node: Any = data
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return ABSENT
        node = node[key]
    return node


def of_roll(**changes: Any) -> dict[str, Any]:
    """A small file of ROLL's; `a__b` in a name stands for a dot."""
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
    """The translated tree, and the paths that each rule names."""
    translated, _, findings = translate(data, {})
    named: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        named[finding.rule] = named.get(finding.rule, ()) + tuple(path for path, _ in finding.found)
    return translated, named


def concrete(pattern: str) -> str:
    """One path that a row's pattern names."""
    return ".".join(NAMES.get(part, part) for part in pattern.split("."))


def for_pattern(data: dict[str, Any], pattern: str) -> dict[str, Any]:
    """`data` with the strategy under which a row's pattern names `concrete(pattern)`."""
    first = pattern.partition(".")[0]
    return put(data, f"{NAMES[first]}.strategy_args.strategy_name", STRATEGIES[first]) if first in STRATEGIES else data
