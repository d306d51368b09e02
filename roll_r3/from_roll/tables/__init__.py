"""Key tables: one module for each group of ROLL's keys, with its steps (`STEPS`) and its rows (`ROWS`)."""

from roll_r3.from_roll.key_rows import Row, Step
from roll_r3.from_roll.tables import (
    advantages,
    algorithm,
    corrections,
    engines,
    fsdp2,
    learning,
    megatron,
    policy_gradient,
    rewards,
    roles,
    run,
    sglang,
    trackers,
    validation,
    vllm,
)

TABLES: dict[str, tuple[tuple[Step, ...], tuple[Row, ...]]] = {
    "Rewards": (rewards.STEPS, rewards.ROWS),
    "The run": (run.STEPS, run.ROWS),
    "Trackers": (trackers.STEPS, trackers.ROWS),
    "Advantages": (advantages.STEPS, advantages.ROWS),
    "The policy-gradient loss": (policy_gradient.STEPS, policy_gradient.ROWS),
    "KL terms and old log-probabilities": (algorithm.STEPS, algorithm.ROWS),
    "Corrections between rollout and trainer": (corrections.STEPS, corrections.ROWS),
    "Roles": (roles.STEPS, roles.ROWS),
    "Training, sampling and data": (learning.STEPS, learning.ROWS),
    "Evaluation": (validation.STEPS, validation.ROWS),
    "Megatron": (megatron.STEPS, megatron.ROWS),
    "FSDP2": (fsdp2.STEPS, fsdp2.ROWS),
    "Rollout engines": (engines.STEPS, engines.ROWS),
    "SGLang": (sglang.STEPS, sglang.ROWS),
    "vLLM": (vllm.STEPS, vllm.ROWS),
}
"""Title -> steps over several keys, then rows. Rewards and roles come early: later tables depend on those left.
Evaluation follows data: it reads the same columns."""

ALL_ROWS: tuple[Row, ...] = tuple(row for _, rows in TABLES.values() for row in rows)
