"""What a run would do, worked out without starting anything: who runs where, what each holds, what travels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
from roll_r3.preflight.gather import gathered_into, shards_gathered_into
from roll_r3.preflight.memory import ELEMENT_BYTES, StageMemory, stage_memory
from roll_r3.preflight.ranks import Grid, Place
from roll_r3.preflight.step import Passes, Step

Devices = tuple[int, ...]
"""Numbers of devices, as in `device_mapping`."""

GROUPS: dict[str, tuple[str, ...]] = {
    "TP": ("tp",),
    "CP": ("cp",),
    "EP": ("etp", "ep"),
    "DP": ("cp", "dp"),
    "EDP": ("edp",),
    "PP": ("pp",),
}
"""Ranks that exchange data -> the axes in which they differ. EP: a layer's tokens on the way to their experts. DP:
gradients, but for those of experts, which are EDP's; with context-parallel ranks it is called DP x CP."""


@dataclass(frozen=True)
class ModelPlan:
    """The model that learns."""

    checkpoint: str
    model_type: str
    parameters: int
    active_parameters: int
    """Those that one token meets, embedding and output layer included."""
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class ChunkPlan:
    """One model chunk of a pipeline stage."""

    layers: tuple[int, ...]
    """Global decoder layers, ascending."""
    moe_layers: tuple[int, ...]
    """Those of them that route."""
    embedding: bool
    output: bool
    """It holds the last norm and the output layer."""
    dense_parameters: int
    """Of each rank, outside experts."""
    expert_parameters: int
    """Of each rank."""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage."""

    devices: Devices
    chunks: tuple[ChunkPlan, ...]
    memory: StageMemory
    """Of each of its devices."""


@dataclass(frozen=True)
class RankPlan:
    """One process of a role."""

    rank: int
    device: int
    place: Place


@dataclass(frozen=True)
class GroupPlan:
    """All groups of one kind, and how many of them reach beyond a node."""

    kind: str
    """One of `GROUPS`, or "DP x CP"."""
    members: tuple[Devices, ...]
    crossing: int
    """Groups with members on several nodes."""
    most_nodes: int
    """Nodes of the most scattered one."""


@dataclass(frozen=True)
class RolePlan:
    """actor_train or reference."""

    name: str
    checkpoint: str
    parameters: int
    """Of its whole model."""
    strategy: str
    devices: Devices
    """In rank order."""
    grid: Grid
    chunks_per_stage: int
    ranks: tuple[RankPlan, ...]
    stages: tuple[StagePlan, ...]
    """Empty under FSDP2, whose memory is not planned."""
    groups: tuple[GroupPlan, ...]
    """Of more than one rank."""
    shards: tuple[Devices, ...]
    """Devices of each data-parallel rank: those that work on the same samples."""
    passes: Passes


@dataclass(frozen=True)
class EnginePlan:
    """One rollout engine."""

    index: int
    devices: Devices
    nodes: Devices
    weights: int
    """Bytes on each of its devices."""


@dataclass(frozen=True)
class RoutesPlan:
    """Recorded routes, in bytes, when every sample is as long as the configuration allows."""

    mode: Literal["disable", "R2", "R3"]
    token: int
    """All MoE layers of one input."""
    sample: int
    """A sample of T tokens has T - 1 inputs."""
    step: int
    rank: tuple[int, ...]
    """Of each pipeline stage, in its own layers: under R2 what a rank keeps on the host, under R3 what it reads in one
    pass over its samples, but for the rows by which its part of a sequence is larger than another's."""
    node: int
    """R3: what the ranks of one trainer's node read in a pass, at most, all of which comes from other nodes where no
    engine is on theirs. 0 under R2, whose routes stay on their ranks."""
    passes: int
    """R3: how often a step reads them: in each epoch of the update, and for old log-probabilities before it where those
    have a pass of their own."""


@dataclass(frozen=True)
class WeightSyncPlan:
    """The trainer's weights on their way to the engines, after every step."""

    update: int
    """Bytes that every device of every engine receives: the whole model, of which it keeps its part."""
    receivers: int
    from_device: int
    """The first rank's, which gathers and broadcasts."""
    bucket: int
    """Bytes that are sent together, so held at once on that device."""
    nodes: Devices
    """Engines' nodes other than the sender's."""
    gathered_node: int
    """Bytes that the trainer's busiest node takes in from its others until the first rank has the whole model."""
    gathered: int
    """Of all its nodes together."""


@dataclass(frozen=True)
class SharedPlan:
    """Devices on which several roles run."""

    roles: tuple[str, ...]
    devices: Devices
    memory: int | None
    """Bytes on the fullest, all roles together; an engine counts its weights alone. None: of one of them they are not
    planned."""


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    experiment: str
    devices: int
    devices_per_node: int
    model: ModelPlan
    step: Step
    roles: tuple[RolePlan, ...]
    engine_strategy: str
    engines: tuple[EnginePlan, ...]
    routes: RoutesPlan
    weight_sync: WeightSyncPlan
    shared: tuple[SharedPlan, ...]

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.devices_per_node)


def make_plan(config: RLVRConfig, models: Mapping[str, RawConfig], *, devices_per_node: int) -> Plan:
    """Plan a configuration that has passed every check.

    Args:
        models: config.json of each role that runs the model, by role. Engines hold actor_train's model.
        devices_per_node: device d is taken to be on node d // this.

    Raises:
        ConfigError: an unknown architecture, or a model that does not split as a layout says.
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
    """Which node a device is on."""

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
    """The devices of each number from 0 on, in rank order; `numbers` are those of the ranks, none left out."""
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
    """The most that roles take together on one of the devices; None: that is not known of one of the roles."""
    sums = [sum(known) for roles in devices if len(known := [size for size in roles if size is not None]) == len(roles)]
    return max(sums) if len(sums) == len(devices) else None
