"""Choices of mode, loss and correction: combinations with a known bias, or without use. docs/which_loss.md explains."""

from __future__ import annotations

from roll_r3.config.derived import forces_ratio, mini_batch_size, optimizer_steps
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.batching import OPTIMIZER_STEP, SAMPLES
from roll_r3.config.rules.paths import TRAIN_REPLAY
from roll_r3.config.rules.table import AnyRule, Rule

_ONE_STEP = ("actor_train.training_args.gradient_accumulation_steps=64",)


def _one_step(config: RLVRConfig) -> bool:
    """Return true if a training step has one optimizer step."""
    size = mini_batch_size(config)
    return size > 0 and config.samples_per_step % size == 0 and optimizer_steps(config, config.samples_per_step) == 1


def _on_policy(config: RLVRConfig) -> bool:
    return _one_step(config) and forces_ratio(config, config.samples_per_step)


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="r2-on-policy",
        fields=(TRAIN_REPLAY, *OPTIMIZER_STEP),
        depends=SAMPLES,
        why="with one optimizer step a rollout the update routes as the pass before it: R2 replays what the trainer "
        "would choose anyway, and costs that pass",
        fix="write disable, or R3 on both sides against the engine's mismatch (docs/which_loss.md)",
        wrong=("actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=disable", *_ONE_STEP),
        right=("actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=disable"),
        violates=lambda c: c.actor_train.router_replay.mode == "R2" and _on_policy(c),
        severity="note",
    ),
    Rule(
        id="r3-on-policy",
        fields=(TRAIN_REPLAY, *OPTIMIZER_STEP),
        depends=SAMPLES,
        why="with one optimizer step a rollout no replay with token weights is less biased where the engine's mismatch "
        "is small; R3 is for a large one",
        fix="compare router_replay/agreement_native and rollout_corr/k3_kl over a few steps (docs/which_loss.md)",
        wrong=_ONE_STEP,
        right=("actor_train.training_args.gradient_accumulation_steps=16",),
        violates=lambda c: c.actor_train.router_replay.mode == "R3" and _one_step(c),
        severity="note",
    ),
    Rule(
        id="weights-with-replay",
        fields=("rollout_correction.is_weight", TRAIN_REPLAY),
        why="R3 removes most of what these weights correct; the R3 paper has R3 alone ahead of both together",
        fix="leave is_weight out at first, and watch rollout_corr/k3_kl (docs/which_loss.md)",
        wrong=("rollout_correction={is_weight: token}",),
        right=("rollout_correction={is_weight: token}", "actor_train.router_replay={}", "actor_infer.router_replay={}"),
        violates=lambda c: c.rollout_correction.is_weight is not None and c.actor_train.router_replay.mode == "R3",
        severity="note",
    ),
)
