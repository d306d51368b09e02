"""Key tables: one module for each group of ROLL's keys, with its steps (`STEPS`) and its rows (`ROWS`)."""

from roll_r3.from_roll.key_rows import Row, Step
from roll_r3.from_roll.tables import algorithm, engines, fsdp2, learning, megatron, rewards, roles, run, sglang, vllm

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
"""Title -> steps over several keys, then rows. Rewards and roles come first: later tables depend on those left."""

ALL_ROWS: tuple[Row, ...] = tuple(row for _, rows in TABLES.values() for row in rows)
