"""Checkpoints: content and location."""

from __future__ import annotations

from roll_r3.config.derived import uses_saving_dir
from roll_r3.config.rules.table import AnyRule, Rule, unread

RULES: tuple[AnyRule, ...] = (
    unread(
        "checkpoints-kept-unread",
        "max_ckpt_to_keep",
        "save_steps",
        lambda c: c.save_steps > 0,
        "leave max_ckpt_to_keep out, or write save_steps: 50",
        wrong=("save_steps=0", "max_ckpt_to_keep=3"),
        right=("max_ckpt_to_keep=3",),
        severity="warning",
    ),
    unread(
        "checkpoint-directory-unread",
        "checkpoint_config.output_dir",
        "save_steps",
        uses_saving_dir,
        "leave checkpoint_config out, or write save_steps: 50",
        wrong=("save_steps=0", "checkpoint_config.output_dir=/checkpoints"),
        right=("checkpoint_config.output_dir=/checkpoints",),
        depends=("save_hf_steps", "resume_from_checkpoint"),
        severity="warning",
    ),
    unread(
        "async-save-unread",
        "checkpoint_config.async_save",
        "save_steps",
        lambda c: c.save_steps > 0,
        "leave async_save out, or write save_steps: 50",
        wrong=("save_steps=0", "checkpoint_config.async_save=true"),
        right=("checkpoint_config.async_save=true",),
        severity="warning",
    ),
    Rule(
        id="nothing-saved",
        fields=("save_steps", "save_hf_steps", "max_steps"),
        why="nothing is saved: the trained weights are lost at the end of the run",
        fix="write save_steps: 50, for example, or save_hf_steps",
        wrong=("save_steps=0",),
        right=("save_steps=0", "save_hf_steps=500"),
        violates=lambda c: c.save_steps == 0 and c.save_hf_steps == 0,
        severity="warning",
    ),
)
