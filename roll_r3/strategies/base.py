"""Contracts of strategies: between the cluster (or a test, or torchrun) and one engine or rank.

Strategies know nothing of Ray. A rollout strategy owns one engine; a train or infer strategy is one rank of a
torch.distributed world. Shape legend as in `roll_r3.batch.batch`: n samples, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from roll_r3.batch.batch import Batch
from roll_r3.batch.route_pieces import ReadRoutes, read_held
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import EngineRole
from roll_r3.config.model_role import ModelRole
from roll_r3.config.sampling_settings import Sampling
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.expert_load import ExpertLoad

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Capabilities:
    """Abilities of a strategy; checks before the start compare them with the configuration."""

    records_routes: bool = False
    """Rollout: returns `routed_experts` with every trajectory."""
    replays: frozenset[str] = frozenset()
    """Train and infer: the replay modes it can run, of R2 and R3."""
    packs: bool = False


@dataclass(frozen=True)
class ProcessInfo:
    """Place of a rank in its torch.distributed world, as torchrun describes it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    """Port of the store at which the ranks meet, hosted by `roll_r3.trainers.world.host_store` or by torchrun's agent;
    by rank 0 if nobody hosts it."""
    device: str = "cpu"
    """"cpu" (gloo) or "cuda" (NCCL)."""


@dataclass(frozen=True)
class EnginePlace:
    """Place of one rollout engine."""

    engine_index: int
    """Number of the engine in the role; names it and varies its seed."""
    device: str
    """"cpu" or "cuda"."""
    gpu_ids: tuple[int, ...]
    """GPUs of the engine on its node; empty on a CPU."""
    log_path: Path
    """Log of the engine's own output."""
    node_address: str = "127.0.0.1"
    """Address of the node for other nodes."""


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, several samples: a group. One engine samples the whole of it, so that its prefix is shared."""

    prompt_ids: tuple[int, ...]
    sample_ids: tuple[str, ...]
    """Id of each response to sample; a retry keeps it."""
    seeds: tuple[int, ...]
    """Sampling seed of each response."""
    group_id: str
    sampling: Sampling
    record_routes: bool
    """True if trajectories must carry routes. Only engines that were started to record them can."""
    cache_key: str = ""
    """Key of the engine's prefix cache: prefixes are found only under the key that stored them."""


@dataclass(frozen=True)
class GenerateResult:
    trajectories: tuple[Trajectory, ...]
    """Samples that came back whole and passed every check, in the order of the request."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Sample id -> the reason for which it was dropped after its retries."""
    lost: tuple[str, ...] = ()
    """Ids of samples without an answer because the engine is down. They cost no retries."""
    retries: int = 0
    """Number of requests sent again."""


class WeightTarget(Protocol):
    """A picklable description of one engine for the sender of weights. It may carry a key: never log it."""


class WeightChannel(Protocol):
    """The sending end of a weight update: held by one training rank, connected to every engine."""

    def begin(self, version: int) -> None:
        """Open an update on every engine. Raises EngineError when one refuses."""

    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Group weights for `send`, about `size` bytes each; weights needed by the engine at once stay together."""

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Send (Hugging Face name, whole tensor) pairs to every engine. Raises EngineError when one fails."""

    def end(self) -> None:
        """Flush caches, raise the weight version, close the update on every engine."""

    def close(self) -> None:
        """Leave the process group."""


class ChannelClass(Protocol):
    """Makes the `WeightChannel` of one kind of engine."""

    def __call__(self, targets: Sequence[Any], *, device: str) -> WeightChannel:
        """
        Args:
            targets: the `WeightTarget`s of engines of this kind.
            device: "cpu" (gloo) or "cuda" (NCCL).
        """


class RolloutStrategy(Protocol):
    """One rollout engine. Every method is a coroutine of the same event loop."""

    async def start(self) -> None:
        """Launch the engine and wait until it answers.

        Raises:
            ConfigError: the model's files cannot be read, or the settings do not fit it.
            EngineError: version outside the supported window, start-up failed or timed out (with the log's end).
        """

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one group. Many calls run at once; the engine itself limits the number of samples in flight.

        An engine that goes down meanwhile raises nothing: the result has the samples that came before, and the others
        are `lost`. A cancelled call ends its samples at the engine.

        Raises:
            EngineError: the engine was not started, or was started again and has had no weights since.
        """

    async def why_down(self, *, ask: bool) -> str:
        """Return why the engine is down and needs a `restart`; empty when it works.

        Args:
            ask: have it give a sign of life, however long the configuration lets it take.
        """

    async def restart(self) -> None:
        """End the rest of the engine and start it again, at weight version 0.

        It must not be asked before `on_weights_updated`, and has another `weight_target`.

        Raises:
            ConfigError, EngineError: as `start`.
        """

    def weight_target(self) -> WeightTarget:
        """Return the address of this engine for a sender of weights."""

    async def on_weights_updated(self, version: int) -> None:
        """A `WeightChannel.end` of this version returned: from now on only its samples are accepted."""

    async def stop(self, *, at_once: bool = False) -> None:
        """End the engine and everything it started. Safe to call twice, and while `start` or `restart` is under way:
        nothing is started afterwards.

        Args:
            at_once: kill instead of asking; requests under way are abandoned.
        """


class RolloutClass(Protocol):
    """Makes a `RolloutStrategy`. Nothing is started yet."""

    def __call__(self, role: EngineRole, place: EnginePlace) -> RolloutStrategy: ...


@dataclass(frozen=True)
class LogProbResult:
    """Log-probabilities of one data-parallel shard; only the rank with `returns_results` has values."""

    log_probs_N: npt.NDArray[np.float32] | None
    """Log-probability of each input's label under the sampling temperature, nats."""
    entropy_N: npt.NDArray[np.float32] | None
    replay: ReplayCounts | None
    """None when routing was native."""
    seconds_in_routes: float = 0.0
    """Time of this rank in code for routes."""
    load: ExpertLoad | None = None
    """Load of the experts, the same on every rank; None without replay."""


@dataclass(frozen=True)
class TrainResult:
    metrics: dict[str, float]
    """Already reduced over micro-batches, mini-batches and ranks; the same on every rank."""
    replay: ReplayCounts | None
    seconds_in_routes: float = 0.0
    skipped: tuple[str, ...] = ()
    """Reason for each skipped optimizer step, for a person to read; the same on every rank."""
    log_probs_N: npt.NDArray[np.float32] | None = None
    """Log-probabilities under the weights before the update, as a `LogProbResult` has them; None if the batch brought
    old ones."""
    entropy_N: npt.NDArray[np.float32] | None = None
    load: ExpertLoad | None = None
    """As of a `LogProbResult`, from the first optimizer step; None where an earlier pass gave it."""


class InferStrategy(Protocol):
    """One rank of a model for log-probabilities."""

    @property
    def data_parallel_rank(self) -> int: ...

    @property
    def data_parallel_size(self) -> int: ...

    @property
    def returns_results(self) -> bool:
        """True on exactly one rank of each data-parallel shard."""

    def initialize(self) -> None:
        """Join the process group, build the model, load the weights."""

    def compute_log_probs(self, batch: Batch) -> LogProbResult:
        """A pass without gradients over this rank's shard; collective.

        Replays `batch.routes` under R3, records routes under R2, and routes natively when replay is off (the
        reference always does). Raises ReplayError under R3 when the batch carries no routes.
        """

    def load_weights(self, path: Path) -> None:
        """Load the weights, and nothing else, of a checkpoint by a `TrainStrategy` of the same kind; collective.

        Raises:
            ConfigError: no checkpoint at `path`, or one of another model; on every rank.
        """

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs, all of them on the first rank; every rank must drain it together."""

    def save_hf(self, path: Path) -> dict[str, int]:
        """Write the weights, config and tokenizer as a Hugging Face checkpoint; collective.

        Returns:
            Bytes of each file on the disk, by name, on the first rank; nothing on the others.

        Raises:
            CheckpointError: it could not be written.
        """

    def close(self) -> None:
        """Leave the process group."""


class Snapshot(Protocol):
    """One rank's part of an unwritten checkpoint."""

    def write(self, path: Path) -> None:
        """Write it; collective, but over a group of its own: a thread may call it while another one trains.

        Args:
            path: a directory to make, on a disk shared by all ranks. It appears once it is complete.

        Raises:
            RollError: there is something at `path`, or a rank could not write; on every rank.
        """


class TrainStrategy(InferStrategy, Protocol):
    """One rank of the trained policy."""

    def train_step(self, batch: Batch, step: int) -> TrainResult:
        """Run all optimizer steps on this rank's shard of step `step`; collective.

        A step with a gradient or loss that is not finite is skipped on all ranks, and changes nothing. The batch needs
        `advantages_N`, for a KL loss `ref_log_probs_N`, and for several optimizer steps `old_log_probs_N`. Without the
        last the ratio is exactly 1, and the result has the log-probabilities of the one optimizer step.

        Raises:
            ReplayError: under R3 the batch carries no routes, or under R2 no recording pass over it came before.
            RollError: more than `max_skipped_steps` in a row were skipped.
        """

    def snapshot(self) -> Snapshot:
        """Copy the state of training into the host's memory, each rank its part; collective.

        It holds weights, optimizer and the position in the learning-rate schedule. It holds no samples, recorded routes
        or configuration, and nothing of the rollout. It needs no random state: everything random follows from the seed
        and the number of the step.
        """

    def load_checkpoint(self, path: Path) -> None:
        """Load a snapshot of the same kind of strategy, on any number of ranks and in any parallel layout; collective.

        Raises:
            ConfigError: no checkpoint at `path`, or one of another model; on every rank.
        """


_Strategy_co = TypeVar("_Strategy_co", bound=InferStrategy, covariant=True)


class ModelClass(Protocol[_Strategy_co]):
    """Makes an `InferStrategy` or a `TrainStrategy`. Nothing is loaded yet."""

    def __call__(self, role: ModelRole, process: ProcessInfo, *, read_routes: ReadRoutes = read_held) -> _Strategy_co:
        """
        Args:
            role: settings of the role that this rank belongs to.
            process: this rank's place in the world.
            read_routes: reads `batch.routes`; by default this process must hold them.

        Raises:
            ConfigError: settings that cannot work together.
        """
