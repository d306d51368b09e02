"""A run that was written for ROLL, in roll_r3's own schema."""

from __future__ import annotations

from typing import Any

from roll_r3.config.report import Finding
from roll_r3.config.roll_yaml import algorithm, engines, fsdp2, learning, megatron, rewards, roles, run, sglang, vllm
from roll_r3.config.roll_yaml.defaults import fill_in_defaults
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import Row, Step

TABLES: dict[str, tuple[tuple[Step, ...], tuple[Row, ...]]] = {
    "Rewards": (rewards.STEPS, rewards.ROWS),
    "The run": (run.STEPS, run.ROWS),
    "The algorithm": (algorithm.STEPS, algorithm.ROWS),
    "Roles": (roles.STEPS, roles.ROWS),
    "Training, sampling and data": (learning.STEPS, learning.ROWS),
    "Megatron": (megatron.STEPS, megatron.ROWS),
    "FSDP2": (fsdp2.STEPS, fsdp2.ROWS),
    "Rollout engines": (engines.STEPS, engines.ROWS),
    "SGLang": (sglang.STEPS, sglang.ROWS),
    "vLLM": (vllm.STEPS, vllm.ROWS),
}
"""Title -> steps over several keys, then rows. The order matters: which rewards and roles are left is known first."""


def translate(data: dict[str, Any], places: dict[str, str]) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """A tree in ROLL's schema, in roll_r3's.

    What both have is left as it is, as is what neither knows: the models say what is wrong with it. Nothing raises.

    Args:
        data: the tree after includes, overrides and interpolation. It is not changed.
        places: dotted path -> where it was written.

    Returns:
        The tree, without ROLL's own keys; `places` with those of the new keys beside the old ones, which findings
        name; and the findings: `roll-translated` and `roll-defaults` (notes), `roll-unsupported` (one error for all
        keys) and `roll-unread` (one warning for all keys). For a file of roll_r3's own the same tree and no findings.
    """
    draft = Draft(data, places)
    for steps, rows in TABLES.values():
        for step in steps:
            step(draft)
        for row in rows:
            for pattern in row.keys:
                for keys in draft.expand(pattern):
                    row.treatment.apply(draft, keys)
    fill_in_defaults(draft)
    return draft.data, draft.places, draft.findings()
