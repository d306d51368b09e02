"""Files of ROLL's other pipelines, which roll_r3 does not run: they are named as such, and not read key by key."""

from __future__ import annotations

from typing import Any

from roll_r3.config.report import Finding

PIPELINES: dict[str, tuple[str, ...]] = {
    "agentic": ("custom_envs", "train_env_manager", "val_env_manager", "custom_env", "env_manager_cls"),
    "SFT": ("sft_train",),
    "DPO": ("chosen_key", "rejected_key", "ipo"),
    "on-policy distillation": ("student_train", "student_infer", "is_pure_opd"),
    "distillation": ("student", "student_pretrain", "teacher_pretrain", "kd_objective", "logits_transfer_backend"),
}
"""Pipeline -> the root keys that only its files have."""


def other_pipeline(data: dict[str, Any], places: dict[str, str]) -> Finding | None:
    """An error that names the pipeline of a file which is not an RLVR one; None for all others.

    Args:
        data: the tree after overrides, so that `key=null` can take a stray key away. It is not changed.
        places: dotted path -> where it was written.
    """
    for name, signs in PIPELINES.items():
        found = tuple((sign, _shown(data[sign])) for sign in signs if _is_on(data.get(sign)))
        if found:
            keys = " and ".join(f"{sign}{_line(places.get(sign, ''))}" for sign, _ in found[:2])
            why = (
                f"this file is for ROLL's {name} pipeline, as {keys} {'say' if len(found) > 1 else 'says'}; roll_r3 "
                "runs the RLVR pipeline alone"
            )
            return Finding("roll-pipeline", "error", found, why, shows="line")
    return None


def _line(place: str) -> str:
    """The line of a place in a file, for a reader who has the file's name already."""
    line = place.rpartition(":")[2]
    return f" (line {line})" if line.isdecimal() else ""


def _is_on(value: object) -> bool:
    """Return true if a key is there and does not switch its pipeline off."""
    return value not in (None, False, "") and value != {}


def _shown(value: object) -> object:
    return "{" + ", ".join(map(str, value)) + "}" if isinstance(value, dict) else value
