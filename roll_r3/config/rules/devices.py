"""Devices: every role has its own number of them, and what they must divide by."""

from __future__ import annotations

from collections import Counter
from math import prod

from roll_r3.config.derived import engine_size, expert_layout, model_parallel_size, model_workers, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import CP, ENGINE, EP, ETP, PP, TP, TRAIN
from roll_r3.config.rules.table import AnyRule, LayoutRule, Rule, Verdict, remainder


def _repeated_devices(config: RLVRConfig) -> Verdict:
    for role, worker in workers(config).items():
        if repeated := sorted(d for d, n in Counter(worker.device_mapping).items() if n > 1):
            return f"{role} names {repeated[:8]} more than once"
    return False


def _roles_without_devices(config: RLVRConfig) -> Verdict:
    return ", ".join(role for role, worker in workers(config).items() if not worker.device_mapping)


def _shared_with_engines(config: RLVRConfig) -> str:
    engines = set(config.actor_infer.device_mapping)
    shared = {role: sorted(engines & set(worker.device_mapping)) for role, worker in model_workers(config).items()}
    return ", ".join(f"with {role} it shares {devices[:8]}" for role, devices in shared.items() if devices)


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="devices-named",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role without devices cannot run",
        fix="write device_mapping: list(range(0,N))",
        wrong=("actor_train.device_mapping=[]",),
        right=("actor_train.device_mapping=5",),
        violates=_roles_without_devices,
    ),
    Rule(
        id="devices-once",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role runs one process on each of its devices, so it can name a device only once",
        fix="remove the repetition",
        wrong=("actor_train.device_mapping=[0, 0]",),
        right=("actor_train.device_mapping=[1, 0]",),
        violates=_repeated_devices,
    ),
    LayoutRule(
        id="devices-over-model-parallel",
        fields=("device_mapping", TP, PP, CP),
        why="the number of devices must be a multiple of TP x PP x CP, the ranks that share one copy of the model",
        fix="change the number of devices, or the layout",
        wrong=(
            "actor_train.device_mapping=range(6)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.tensor_model_parallel_size=2",
        ),
        right=(
            "actor_train.device_mapping=range(8)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.tensor_model_parallel_size=2",
        ),
        violates=lambda w: remainder(len(w.device_mapping), model_parallel_size(w), "ranks of a copy"),
    ),
    LayoutRule(
        id="devices-over-expert-parallel",
        fields=("device_mapping", EP, ETP, PP),
        why="the number of devices must be a multiple of EP x ETP x PP, the ranks that share one copy of the experts "
        "(ETP defaults to 1 with expert parallelism, else to TP)",
        fix="change the number of devices, or the layout",
        wrong=("actor_train.device_mapping=range(4)", f"{TRAIN}.expert_model_parallel_size=3"),
        right=(
            "actor_train.device_mapping=range(4)",
            f"{TRAIN}.expert_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        violates=lambda w: remainder(len(w.device_mapping), prod(expert_layout(w)), "ranks of a copy of the experts"),
    ),
    Rule(
        id="engine-devices-over-tp",
        fields=("actor_infer.device_mapping", f"{ENGINE}.tp_size"),
        why="every engine takes tp_size devices",
        fix="change the number of devices to a multiple of tp_size",
        wrong=("actor_infer.device_mapping=range(3)", f"{ENGINE}.tp_size=2"),
        right=("actor_infer.device_mapping=range(4)", f"{ENGINE}.tp_size=2"),
        violates=lambda c: remainder(len(c.actor_infer.device_mapping), engine_size(c), "devices of an engine"),
    ),
    Rule(
        id="gpus-not-shared",
        fields=(
            "actor_infer.device_mapping",
            "actor_train.device_mapping",
            "reference.device_mapping",
            "device_type",
        ),
        why="an engine keeps its share of a GPU's memory for itself, it cannot sleep or make room for a trainer; and "
        "weights go to it over NCCL, which refuses two ranks on one GPU",
        fix="give actor_infer GPUs of its own",
        wrong=("device_type=cuda",),
        right=("device_type=cuda", "actor_infer.device_mapping=[1]"),
        violates=lambda c: c.device_type == "cuda" and _shared_with_engines(c),
    ),
)
