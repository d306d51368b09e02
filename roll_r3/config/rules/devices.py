"""Devices: the number per role, their divisors, sharing, and nodes.

Sharing and nodes are judged here alone: before the start by the numbers in the file, and at placement by the devices of
the cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from math import prod

from roll_r3.config.derived import (
    devices_per_node,
    engine_devices,
    engine_size,
    expert_layout,
    model_parallel_size,
    model_workers,
    roles_with_gpu_kernels,
    server,
    workers,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import OWN_GPUS
from roll_r3.config.rules.paths import CP, ENGINE, EP, ETP, MEGATRON, PP, TP, TRAIN
from roll_r3.config.rules.table import AnyRule, LayoutRule, Rule, Verdict, remainder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NodeOf = Callable[[int], str]
"""Name of the node of a device, by the device's number."""
_SHOWN = 8
"""Largest number of items in a listing."""


def _repeated_devices(config: RLVRConfig) -> Verdict:
    for role, worker in workers(config).items():
        if repeated := sorted(d for d, n in Counter(worker.device_mapping).items() if n > 1):
            return f"{role} names {repeated[:8]} more than once"
    return False


def _roles_without_devices(config: RLVRConfig) -> Verdict:
    return ", ".join(role for role, worker in workers(config).items() if not worker.device_mapping)


def shared_with_engines(config: RLVRConfig) -> str:
    """Return each role with devices of the engines, and those devices; empty if there is none."""
    engines = set(config.actor_infer.device_mapping)
    shared = {role: sorted(engines & set(worker.device_mapping)) for role, worker in model_workers(config).items()}
    return ", ".join(f"{role} also has devices {listed(devices)}" for role, devices in shared.items() if devices)


def scattered_engines(config: RLVRConfig, node_of: NodeOf) -> str:
    """Return the first engine with devices on several nodes, and the nodes; empty if there is none."""
    on = {index: (devices, _nodes(devices, node_of)) for index, devices in enumerate(engine_devices(config))}
    scattered = [index for index, (_, nodes) in on.items() if len(nodes) > 1]
    if not scattered:
        return ""
    devices, nodes = on[scattered[0]]
    others = f" (and {len(scattered) - 1:,} more)" if len(scattered) > 1 else ""
    return f"engine {scattered[0]}{others} takes devices {listed(devices)}, on nodes {listed(nodes)}"


def engines_out_of_reach(config: RLVRConfig, node_of: NodeOf) -> str:
    """Return engines with a loopback address on other nodes than the trainer's first rank; empty if there are none."""
    settings = server(config)
    if settings is None or settings.host not in LOOPBACK:
        return ""
    trainer = node_of(config.actor_train.device_mapping[0])
    beyond = [index for index, devices in enumerate(engine_devices(config)) if node_of(devices[0]) != trainer]
    return f"engines {listed(beyond)} are not on node {trainer}" if beyond else ""


def listed(items: Sequence[int | str], count: int | None = None) -> str:
    """Return the first few of `count` items (None: of all items) as text."""
    left = (len(items) if count is None else count) - _SHOWN
    more = f" and {left:,} more" if left > 0 else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def _nodes(devices: Sequence[int], node_of: NodeOf) -> list[str]:
    return list(dict.fromkeys(map(node_of, devices)))


def _node_by_number(config: RLVRConfig) -> NodeOf:
    size = devices_per_node(config)
    return lambda device: str(device // size)


def _by_number(judge: Callable[[RLVRConfig, NodeOf], str]) -> Callable[[RLVRConfig], Verdict]:
    """Return a verdict about nodes from the numbers of devices. CPU slots are all on one machine.

    Another rule rejects engines that do not divide.
    """

    def violates(config: RLVRConfig) -> Verdict:
        if config.device_type == "cpu" or any(not worker.device_mapping for worker in workers(config).values()):
            return False
        found = judge(config, _node_by_number(config))
        return f"{found}; nodes of {devices_per_node(config)}" if found else False

    return violates


def _nodes_assumed(config: RLVRConfig) -> bool:
    """Return true if the real nodes may differ from the nodes by device number."""
    return config.device_type != "cuda" or config.num_gpus_per_node is None


def _unnamed_devices(config: RLVRConfig) -> Verdict:
    named = {device for worker in workers(config).values() for device in worker.device_mapping}
    total = max(named, default=-1) + 1
    if not (unnamed := total - len(named)):
        return False
    first = tuple(islice((device for device in range(total) if device not in named), _SHOWN))
    return f"of {total:,} devices no role uses {listed(first, unnamed)}"


GPUS_NOT_SHARED = Rule(
    id="gpus-not-shared",
    fields=(
        "actor_infer.device_mapping",
        "actor_train.device_mapping",
        "reference.device_mapping",
        "device_type",
    ),
    why="an engine cannot share a GPU (it can share a CPU slot): it keeps its part of the memory, and weights arrive "
    "over NCCL, which rejects two ranks on one GPU",
    fix="give actor_infer devices of its own, or write device_type: cpu",
    wrong=("device_type=cuda",),
    right=OWN_GPUS,
    violates=lambda c: c.device_type != "cpu" and shared_with_engines(c),
    # not `*`: it would match a mistake in any field at the top
    depends=tuple(
        f"{role}.{MEGATRON}.{kernel}"
        for role in ("actor_train", "reference")
        for kernel in ("moe_grouped_gemm", "moe_router_fusion")
    ),
    # with GPU kernels it does not start on CPU slots either
    only_warns=lambda c: c.device_type == "auto" and not roles_with_gpu_kernels(c),
)
ENGINE_ON_ONE_NODE = Rule(
    id="engine-on-one-node",
    fields=("actor_infer.device_mapping", f"{ENGINE}.tp_size", "num_gpus_per_node"),
    depends=("device_type", "actor_infer.strategy_args.strategy_name"),
    why="the devices of an engine must share a node",
    fix="write a tp_size that divides the devices of a node, begin actor_infer's devices at the first of a node, or "
    "write num_gpus_per_node",
    wrong=("device_type=cuda", "num_gpus_per_node=2", "actor_infer.device_mapping=[1, 2]", f"{ENGINE}.tp_size=2"),
    right=(
        "device_type=cuda",
        "num_gpus_per_node=2",
        "actor_train.device_mapping=range(2)",
        "actor_infer.device_mapping=[2, 3]",
        f"{ENGINE}={{tp_size: 2, host: 0.0.0.0}}",
    ),
    violates=_by_number(scattered_engines),
    only_warns=_nodes_assumed,
)
ENGINES_BEYOND_LOOPBACK = Rule(
    id="engines-beyond-loopback",
    fields=(f"{ENGINE}.host", "actor_infer.device_mapping", "actor_train.device_mapping", "num_gpus_per_node"),
    depends=("device_type", f"{ENGINE}.tp_size", "actor_infer.strategy_args.strategy_name"),
    why="the trainer's first rank sends weights to every engine, and a loopback address cannot be reached from another "
    "node",
    fix="write host: 0.0.0.0 (every address of an engine's node; its key protects it)",
    wrong=("device_type=cuda", "num_gpus_per_node=1", "actor_infer.device_mapping=[1]"),
    right=(
        "device_type=cuda",
        "num_gpus_per_node=1",
        "actor_infer.device_mapping=[1]",
        f"{ENGINE}.host=0.0.0.0",
    ),
    violates=_by_number(engines_out_of_reach),
    only_warns=_nodes_assumed,
)

RULES: tuple[AnyRule, ...] = (
    Rule(
        id="devices-named",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role without devices cannot run",
        fix="write device_mapping: list(range(0,N))",
        wrong=("actor_train.device_mapping=[]",),
        right=("actor_train.device_mapping=1",),
        violates=_roles_without_devices,
    ),
    Rule(
        id="devices-once",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role runs one process per device, so it can name a device only once",
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
    GPUS_NOT_SHARED,
    ENGINE_ON_ONE_NODE,
    ENGINES_BEYOND_LOOPBACK,
    Rule(
        id="devices-unnamed",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a run reserves every device up to the highest number, also those of no role",
        fix="number the devices without gaps",
        wrong=("actor_infer.device_mapping=[2]",),
        right=("actor_infer.device_mapping=[1]",),
        violates=_unnamed_devices,
        severity="warning",
    ),
)
