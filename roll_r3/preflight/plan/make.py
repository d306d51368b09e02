"""Plan of a run from its configuration: places, layers, memory and traffic. Starts nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roll_r3.batch.routes import route_dtype
from roll_r3.config.derived import (
    MegatronWorker,
    ModelWorker,
    checkpoint_of,
    engine_devices,
    engine_size,
    layout,
    model_workers,
    runs_megatron,
    sequence_parts,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError
from roll_r3.models.architectures.base import RawConfig
from roll_r3.models.size import ModelSize, held_parameters, model_size
from roll_r3.preflight.plan.gather import gathered_into, shards_gathered_into
from roll_r3.preflight.plan.memory import ELEMENT_BYTES, stage_memory
from roll_r3.preflight.plan.plan import (
    ChunkPlan,
    Devices,
    EnginePlan,
    GroupPlan,
    ModelPlan,
    Plan,
    RankPlan,
    RolePlan,
    RoutesPlan,
    SharedPlan,
    StagePlan,
    WeightSyncPlan,
)
from roll_r3.preflight.plan.ranks import Grid
from roll_r3.preflight.plan.step import Passes, Step

GROUPS: dict[str, tuple[str, ...]] = {
    "TP": ("tp",),
    "CP": ("cp",),
    "EP": ("etp", "ep"),
    "DP": ("cp", "dp"),
    "EDP": ("edp",),
    "PP": ("pp",),
}
"""Kind of group -> axes in which its ranks differ.

EP moves tokens to their experts. DP reduces gradients, EDP those of experts. With context parallelism DP is shown as
DP x CP.
"""


def make_plan(config: RLVRConfig, models: Mapping[str, RawConfig], *, devices_per_node: int) -> Plan:
    """Plan a configuration after it passed every check.

    Args:
        models: role -> config.json, for each role with a model. Engines hold actor_train's model.
        devices_per_node: number of devices of a node; device d is assumed to be on node d // devices_per_node.

    Raises:
        ConfigError: unknown architecture, or the model does not divide over the layout.
    """
    sizes = {name: model_size(models[name]) for name in model_workers(config)}
    size = sizes["actor_train"]
    nodes = _Nodes(devices_per_node)
    step = Step.of(config)
    roles = tuple(_role(config, name, worker, sizes[name], nodes) for name, worker in model_workers(config).items())
    engines = _engines(config, size, nodes)
    used = {d for role in roles for d in role.devices} | {d for engine in engines for d in engine.devices}
    return Plan(
        experiment=config.exp_name,
        devices=max(used) + 1,
        devices_per_node=devices_per_node,
        model=ModelPlan(
            checkpoint=checkpoint_of(config, "actor_train"),
            model_type=str(models["actor_train"]["model_type"]),
            parameters=size.total,
            active_parameters=size.active,
            num_layers=size.shape.num_layers,
            moe_layers=tuple(sorted(size.shape.moe_layers)),
            num_experts=size.shape.num_experts,
            top_k=size.shape.top_k,
        ),
        step=step,
        roles=roles,
        engine_strategy=config.actor_infer.strategy_args.strategy_name,
        engines=engines,
        routes=_routes(config, size, roles[0], nodes),
        weight_sync=_weight_sync(config, size, engines, nodes),
        shared=_shared(roles, engines),
    )


@dataclass(frozen=True)
class _Nodes:
    """Mapping from devices to nodes."""

    size: int

    def of(self, devices: Sequence[int]) -> Devices:
        return tuple(sorted({device // self.size for device in devices}))


def _role(config: RLVRConfig, name: str, worker: ModelWorker, size: ModelSize, nodes: _Nodes) -> RolePlan:
    grid, passes, devices = Grid.of(worker), Passes.of(config, worker), worker.device_mapping
    places, on_megatron = grid.places(), runs_megatron(worker)
    stages = _stages(config, name, worker, size, passes) if on_megatron else ()
    return RolePlan(
        name=name,
        checkpoint=checkpoint_of(config, name),
        parameters=size.total,
        strategy=worker.strategy_args.strategy_name,
        devices=devices,
        grid=grid,
        chunks_per_stage=layout(worker).chunks_per_stage or 1 if on_megatron else 1,
        ranks=tuple(RankPlan(rank, devices[rank], place) for rank, place in enumerate(places)),
        stages=stages,
        groups=_groups(grid, devices, nodes, GROUPS if on_megatron else {"DP": GROUPS["DP"]}),
        shards=_devices_by(devices, [place.dp for place in places]),
        passes=passes,
    )


def _devices_by(devices: Devices, numbers: Sequence[int]) -> tuple[Devices, ...]:
    """Group devices by number, in rank order.

    Args:
        numbers: one per rank, from 0 without gaps.
    """
    found: list[list[int]] = [[] for _ in range(max(numbers) + 1)]
    for device, number in zip(devices, numbers, strict=True):
        found[number].append(device)
    return tuple(map(tuple, found))


def _stages(
    config: RLVRConfig, name: str, worker: MegatronWorker, size: ModelSize, passes: Passes
) -> tuple[StagePlan, ...]:
    on = _devices_by(worker.device_mapping, [place.pp for place in Grid.of(worker).places()])
    try:
        held = held_parameters(size, worker)
    except ValueError as error:
        raise ConfigError(f"{name}.strategy_args.strategy_config: {error}") from error
    stages = []
    for stage, chunks in enumerate(held):
        last = stage == len(held) - 1
        memory = stage_memory(
            worker,
            size.shape,
            held,
            stage,
            passes,
            entropy_gradient=config.entropy_loss_coef > 0,
            fp32_lm_head=config.fp32_lm_head,
        )
        stages.append(
            StagePlan(
                devices=on[stage],
                chunks=tuple(
                    ChunkPlan(
                        layers=chunk.layers,
                        moe_layers=tuple(layer for layer in chunk.layers if layer in size.shape.moe_layers),
                        embedding=stage == 0 and number == 0,
                        output=last and number == len(chunks) - 1,
                        dense_parameters=chunk.dense,
                        expert_parameters=chunk.experts,
                    )
                    for number, chunk in enumerate(chunks)
                ),
                memory=memory,
            )
        )
    return tuple(stages)


def _groups(grid: Grid, devices: Devices, nodes: _Nodes, kinds: Mapping[str, tuple[str, ...]]) -> tuple[GroupPlan, ...]:
    found = []
    for kind, axes in kinds.items():
        members = tuple(tuple(devices[rank] for rank in group) for group in grid.groups(*axes))
        spans = [len(nodes.of(group)) for group in members]
        if len(members[0]) > 1:
            name = "DP x CP" if kind == "DP" and grid.cp > 1 else kind
            found.append(GroupPlan(name, members, sum(span > 1 for span in spans), max(spans)))
    return tuple(found)


def _engines(config: RLVRConfig, size: ModelSize, nodes: _Nodes) -> tuple[EnginePlan, ...]:
    engine = config.actor_infer.strategy_args.strategy_config
    weights = -(-size.total * ELEMENT_BYTES[engine.dtype] // engine_size(config))
    parts = enumerate(engine_devices(config))
    return tuple(EnginePlan(index, part, nodes.of(part), weights) for index, part in parts)


def _routes(config: RLVRConfig, size: ModelSize, trainer: RolePlan, nodes: _Nodes) -> RoutesPlan:
    mode = config.actor_train.router_replay.mode
    shape = size.shape
    layer = shape.top_k * route_dtype(shape.num_experts).itemsize
    inputs = Step.of(config).longest - 1
    sample = len(shape.moe_layers) * layer * inputs
    step = sample * config.samples_per_step
    token = len(shape.moe_layers) * layer
    if mode == "disable":
        return RoutesPlan(mode, 0, 0, 0, (0,) * trainer.grid.pp, 0, 0)
    own = [sum(len(chunk.moe_layers) for chunk in stage.chunks) for stage in trainer.stages]
    own = own or [len(shape.moe_layers)]
    held = [layers * layer * inputs * trainer.passes.samples for layers in own]
    if mode == "R2":
        return RoutesPlan(mode, token, sample, step, tuple(held), 0, 0)
    parts = sequence_parts(config.actor_train)
    read = tuple(-(-size // parts) for size in held)
    passes = config.ppo_epochs + (trainer.passes.infer is not None)
    per_node: Counter[int] = Counter()
    for rank in trainer.ranks:
        per_node[nodes.of([rank.device])[0]] += read[rank.place.pp]
    return RoutesPlan(mode, token, sample, step, read, max(per_node.values()), passes)


def _weight_sync(config: RLVRConfig, size: ModelSize, engines: Sequence[EnginePlan], nodes: _Nodes) -> WeightSyncPlan:
    engine = config.actor_infer.strategy_args.strategy_config
    worker = config.actor_train
    first = worker.device_mapping[0]
    reached = {node for one in engines for node in one.nodes} - set(nodes.of([first]))
    on, element = [nodes.of([device])[0] for device in worker.device_mapping], ELEMENT_BYTES[worker.model_args.dtype]
    if runs_megatron(worker):
        gathered = gathered_into(Grid.of(worker), held_parameters(size, worker), on, element=element)
    else:
        gathered = shards_gathered_into(size.total, on, element=element)
    return WeightSyncPlan(
        update=size.total * ELEMENT_BYTES[engine.dtype],
        receivers=sum(len(one.devices) for one in engines),
        from_device=first,
        bucket=int(engine.weight_bucket_mb * (1 << 20)),
        nodes=tuple(sorted(reached)),
        gathered_node=max(gathered.values()),
        gathered=sum(gathered.values()),
    )


def _shared(roles: Sequence[RolePlan], engines: Sequence[EnginePlan]) -> tuple[SharedPlan, ...]:
    on: dict[int, dict[str, int | None]] = {}
    for role in roles:
        if not role.stages:
            on |= {device: {**on.get(device, {}), role.name: None} for device in role.devices}
        for stage in role.stages:
            for device in stage.devices:
                on.setdefault(device, {})[role.name] = stage.memory.total
    for engine in engines:
        for device in engine.devices:
            on.setdefault(device, {})["actor_infer"] = engine.weights
    found: dict[tuple[str, ...], list[int]] = {}
    for device in sorted(on):
        if len(on[device]) > 1:
            found.setdefault(tuple(on[device]), []).append(device)
    return tuple(
        SharedPlan(names, tuple(devices), _fullest([tuple(on[device].values()) for device in devices]))
        for names, devices in found.items()
    )


def _fullest(devices: Sequence[tuple[int | None, ...]]) -> int | None:
    """Return the largest sum of all roles on one device, or None if a role is not planned."""
    sums = [sum(known) for roles in devices if len(known := [size for size in roles if size is not None]) == len(roles)]
    return max(sums) if len(sums) == len(devices) else None
