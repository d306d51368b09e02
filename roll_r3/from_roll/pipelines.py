"""Detection of files of ROLL's other pipelines, rejected as a whole instead of key by key."""

from __future__ import annotations

from typing import Any

from roll_r3.config.findings.report import Finding

PIPELINES: dict[str, tuple[str, ...]] = {
    "agentic": ("custom_envs", "train_env_manager", "val_env_manager", "custom_env", "env_manager_cls"),
    "SFT": ("sft_train",),
    "DPO": ("chosen_key", "rejected_key", "ipo"),
    "on-policy distillation": ("student_train", "student_infer", "is_pure_opd"),
    "distillation": ("student", "student_pretrain", "teacher_pretrain", "kd_objective", "logits_transfer_backend"),
}
"""Pipeline -> root keys found in its files alone."""


def other_pipeline(data: dict[str, Any], places: dict[str, str]) -> Finding | None:
    """Return an error with the pipeline of a file of another pipeline than RLVR; None for all other files.

    Args:
        data: the tree after overrides, so `key=null` can remove a stray key. It is not changed.
        places: dotted path -> where it was written.
    """
    for name, signs in PIPELINES.items():
        found = tuple((sign, _shown(data[sign])) for sign in signs if _is_on(data.get(sign)))
        if found:
            keys = " and ".join(f"{sign}{_line(places.get(sign, ''))}" for sign, _ in found[:2])
            why = f"this file is for ROLL's {name} pipeline: it has {keys}; roll_r3 runs the RLVR pipeline alone"
            return Finding("roll-pipeline", "error", found, why, shows="line")
    return None


def _line(place: str) -> str:
    """Return the line of a place in the file, without the file's name."""
    line = place.rpartition(":")[2]
    return f" (line {line})" if line.isdecimal() else ""


def _is_on(value: object) -> bool:
    """Return true if a key is given and does not turn its pipeline off."""
    return value not in (None, False, "") and value != {}


def _shown(value: object) -> object:
    return "{" + ", ".join(map(str, value)) + "}" if isinstance(value, dict) else value
