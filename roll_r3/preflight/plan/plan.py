"""Plan of a run as plain data: the roles, devices, memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_r3.preflight.plan.memory import StageMemory
from roll_r3.preflight.plan.ranks import Grid, Place
from roll_r3.preflight.plan.step import Passes, Step

Devices = tuple[int, ...]
"""Device numbers, as in `device_mapping`."""


@dataclass(frozen=True)
class ModelPlan:
    """Trained model."""

    checkpoint: str
    model_type: str
    parameters: int
    active_parameters: int
    """Parameters used for one token, embedding and output layer included."""
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class ChunkPlan:
    """Model chunk of a pipeline stage."""

    layers: tuple[int, ...]
    """Global decoder layers, ascending."""
    moe_layers: tuple[int, ...]
    """MoE layers among them."""
    embedding: bool
    output: bool
    """True if the chunk holds the last norm and the output layer."""
    dense_parameters: int
    """On each rank, outside experts."""
    expert_parameters: int
    """On each rank."""


@dataclass(frozen=True)
class StagePlan:
    """Pipeline stage."""

    devices: Devices
    chunks: tuple[ChunkPlan, ...]
    memory: StageMemory
    """On each of its devices."""


@dataclass(frozen=True)
class RankPlan:
    """Process of a role."""

    rank: int
    device: int
    place: Place


@dataclass(frozen=True)
class GroupPlan:
    """All groups of one kind, and the number of them on several nodes."""

    kind: str
    """One of `GROUPS`, or "DP x CP"."""
    members: tuple[Devices, ...]
    crossing: int
    """Number of groups with members on several nodes."""
    most_nodes: int
    """Number of nodes of the most scattered group."""


@dataclass(frozen=True)
class RolePlan:
    """Role with a model: actor_train or reference."""

    name: str
    checkpoint: str
    parameters: int
    """Parameters of its whole model."""
    strategy: str
    devices: Devices
    """In rank order."""
    grid: Grid
    chunks_per_stage: int
    ranks: tuple[RankPlan, ...]
    stages: tuple[StagePlan, ...]
    """Empty under FSDP2: its memory is not planned."""
    groups: tuple[GroupPlan, ...]
    """Groups of more than one rank."""
    shards: tuple[Devices, ...]
    """Devices of each data-parallel rank; all of them work on the same samples."""
    passes: Passes


@dataclass(frozen=True)
class EnginePlan:
    """Rollout engine."""

    index: int
    devices: Devices
    nodes: Devices
    weights: int
    """Bytes on each of its devices."""


@dataclass(frozen=True)
class RoutesPlan:
    """Bytes of recorded routes, if every sample is as long as the configuration allows."""

    mode: Literal["disable", "R2", "R3"]
    token: int
    """All MoE layers of one input token."""
    sample: int
    """A sample of T tokens has T - 1 inputs."""
    step: int
    rank: tuple[int, ...]
    """Bytes of a rank of each pipeline stage, in its own layers. Under R2 a rank keeps them on the host.

    Under R3 a rank reads them in one pass over its samples. Uneven parts of a sequence may add a few rows.
    """
    node: int
    """R3: maximum bytes that a trainer node reads in a pass, all from other nodes unless it has an engine of its own.

    0 under R2: routes stay on their ranks.
    """
    passes: int
    """R3: number of reads in a step: one per epoch, and one for old log-probabilities with a pass of their own."""


@dataclass(frozen=True)
class WeightSyncPlan:
    """Transfer of the trainer's weights to the engines, after every step."""

    update: int
    """Bytes received by every engine device: the whole model. Each device keeps its part."""
    receivers: int
    from_device: int
    """Device of the first rank. It gathers and broadcasts."""
    bucket: int
    """Bytes sent together, and so held at once on `from_device`."""
    nodes: Devices
    """Nodes of engines other than the sender's."""
    gathered_node: int
    """Bytes that enter the trainer's busiest node until the first rank has the whole model."""
    gathered: int
    """Bytes that enter all its nodes together."""


@dataclass(frozen=True)
class SharedPlan:
    """Devices shared by several roles."""

    roles: tuple[str, ...]
    devices: Devices
    memory: int | None
    """Computed bytes on the fullest device, all roles together; only weights are counted for an engine.

    None if the memory of one role is not planned.
    """


@dataclass(frozen=True)
class Plan:
    """Plan of a whole run."""

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
