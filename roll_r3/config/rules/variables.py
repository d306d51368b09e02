"""Environment variables of workers and engines."""

from __future__ import annotations

from collections.abc import Mapping

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule
from roll_r3.config.secrets import HIDDEN

OWN_PREFIXES = ("RAY_", "ROLL_R3_", "TORCHELASTIC_")
OWN = (
    "CUDA_VISIBLE_DEVICES",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "PYTHONHOME",
    "SGLANG_RETURN_ORIGINAL_LOGPROB",
    "SGLANG_USE_CPU_ENGINE",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE",
    "VLLM_PLUGINS",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_CPU_OMP_THREADS_BIND",
)
"""Variables set by this program, by Ray, or by an engine's start."""


def _own(config: RLVRConfig) -> str:
    return ", ".join(name for name in config.system_envs if name in OWN or name.startswith(OWN_PREFIXES))


def possible(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a process can have."""
    return {name: value for name, value in variables.items() if name and "=" not in name and "\0" not in name + value}


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="own-variables",
        fields=("system_envs",),
        why="the program, Ray or the engine sets these variables itself, by process",
        fix="remove them; for Ray itself, set RAY_* in the shell before the start",
        wrong=("system_envs={CUDA_VISIBLE_DEVICES: '0'}",),
        right=("system_envs={NCCL_DEBUG: INFO}",),
        violates=_own,
    ),
    Rule(
        id="variable-names",
        fields=("system_envs",),
        why="the name of an environment variable must hold a character, and no =; neither it nor its value may hold a "
        "zero byte",
        fix="write NAME: value",
        wrong=("system_envs={A=B: '1'}",),
        right=("system_envs={A: '1'}",),
        violates=lambda c: possible(c.system_envs) != c.system_envs,
    ),
    Rule(
        id="hidden-variables",
        fields=("system_envs",),
        why=f"a printed or saved configuration has {HIDDEN} in place of secrets, and the values themselves are needed",
        fix="write the values, or remove these variables and set them in the shell before the start",
        wrong=(f"system_envs={{HF_TOKEN: {HIDDEN}}}",),
        right=("system_envs={HF_TOKEN: hf_example}",),
        violates=lambda c: ", ".join(name for name, value in c.system_envs.items() if value == HIDDEN),
    ),
)
