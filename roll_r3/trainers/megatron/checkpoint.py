"""Contents of a megatron model's checkpoint: whole tensors by name, and this rank's part of each.

Megatron describes each parameter as a part of a whole tensor (`sharded_state_dict`), as for its own checkpoints. The
file format is not megatron's: its files are partly pickles, and its optimizers' files depend on their kind and on the
layout. Here every weight and each of Adam's moments is a whole fp32 tensor in any layout and with any optimizer. A
checkpoint written by one of them can be read by any other.

Names are megatron's, under `model.` and `optimizer.`, with layers and experts numbered over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from megatron.core.parallel_state import get_tensor_model_parallel_world_size

from roll_r3.trainers import checkpoint
from roll_r3.trainers.checkpoint import Snapshot, State, host_copy
from roll_r3.trainers.megatron.bridge import plain_norms, unwrap
from roll_r3.trainers.megatron.model import MegatronModel
from roll_r3.trainers.megatron.optimizer import MOMENTS, Optimizer, Slot

WEIGHTS = "model."
MASTER = "weight"
"""Kind of an optimizer's master weights, beside Adam's moments."""
DONE = "optimizer.done"
"""int64 [1]: number of optimizer steps taken; it decides Adam's bias correction and the learning rate."""

_ONE_NAME_EACH = {"non_homogeneous_layers": True, "singleton_local_shards": True}
"""Megatron's options for one name per layer, expert and half of a gated projection: a rank has one part per name."""


def snapshot(model: MegatronModel, optimizer: Optimizer) -> Snapshot:
    """Copy weights, buffers, moments and the number of steps; collective."""
    parts = _Parts(model)
    done = (DONE, torch.tensor([optimizer.done]))
    return Snapshot(_merged(parts.copied_buffers(), _gathered(parts, optimizer.slots()), [done]))


def load(model: MegatronModel, optimizer: Optimizer, path: Path) -> None:
    """Resume from a snapshot of any layout; collective. Raises as `checkpoint.load`."""
    parts, done = _Parts(model), torch.tensor([0])
    landings = [landing for slot in optimizer.slots() for landing in _landings(slot)]
    kept = [entry for landing in landings for entry in landing.entries(parts)]
    checkpoint.load([parts.weights(), _merged(kept, [(DONE, done)])], path)
    for landing in landings:
        landing.settle()
    optimizer.resume(int(done))


def load_weights(model: MegatronModel, path: Path) -> None:
    """Read weights and buffers only; collective. Raises as `checkpoint.load`."""
    checkpoint.load([_Parts(model).weights()], path, within=WEIGHTS)


Entries = Iterable[tuple[str, torch.Tensor]]


def _merged(*entries: Entries) -> State:
    """Merge entries into a state; a rank must have at most one part per name, since a second would replace it."""
    state: State = {}
    for name, tensor in (entry for some in entries for entry in some):
        assert name not in state, f"two parts of {name} on one rank"
        state[name] = tensor
    return state


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer of this rank, and megatron's description of it."""

    tensor: torch.Tensor
    described: ShardedTensor | ShardedTensorFactory

    def check(self) -> None:
        """Check the description: megatron treats modules without one as holding full copies."""
        is_split = getattr(self.tensor, "tensor_model_parallel", False) and get_tensor_model_parallel_world_size() > 1
        for part, _ in self.parts(""):
            assert not is_split or ".experts." in part.key or part.local_shape != part.global_shape, (
                f"{part.key} is split over tensor-parallel ranks, but described as whole"
            )

    def parts(self, prefix: str, suffix: str = "") -> Iterator[tuple[ShardedTensor, int]]:
        """Its parts of whole tensors, and the first row of each in `tensor`.

        Fused projections have several parts.
        """
        if isinstance(self.described, ShardedTensorFactory):
            built = list(nested_values([self.described.build()]))
        else:
            built = [self.described]
        for part in built:
            before = part.data.storage_offset() - self.tensor.storage_offset()
            yield replace(part, key=f"{prefix}{plain_norms(part.key)}{suffix}"), before // self.tensor.stride(0)


class _Parts:
    """This rank's parts of a model."""

    def __init__(self, model: MegatronModel) -> None:
        self._vocab_size = model.vocab_size
        self._held = [
            _Held(described.data, described)
            for chunk in model.chunks
            for described in nested_values(unwrap(chunk).sharded_state_dict(metadata=dict(_ONE_NAME_EACH)))
            if isinstance(described, ShardedTensor | ShardedTensorFactory)
        ]
        self._by_id = {id(held.tensor): held for held in self._held}
        for held in self._held:
            held.check()

    def weights(self) -> State:
        """The model's own memory: parameters and buffers."""
        return _merged(*(self._entries(held, held.tensor, WEIGHTS) for held in self._held))

    def copied_buffers(self) -> Entries:
        """Copies of the buffers, held by no optimizer."""
        for held in self._held:
            if not isinstance(held.tensor, torch.nn.Parameter):
                yield from self._entries(held, host_copy(held.tensor), WEIGHTS)

    def of(self, slot: Slot, kind: str, rows: torch.Tensor, first_row: int = 0) -> Entries:
        """Entries of an optimizer's tensor for a parameter.

        Args:
            kind: `MASTER`, or one of `MOMENTS`.
            rows: tensor of the parameter's shape, or some rows of it.
            first_row: row of the parameter at the start of `rows`.
        """
        held = self._by_id[id(slot.parameter)]
        names = (WEIGHTS, "") if kind == MASTER else ("optimizer.", f".{kind}")
        return self._entries(held, rows, *names, first_row=first_row)

    def _entries(
        self, held: _Held, rows: torch.Tensor, prefix: str, suffix: str = "", first_row: int = 0
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, part for torch.distributed.checkpoint) pairs backed by the memory of `rows`."""
        for part, begins in held.parts(prefix, suffix):
            begin, end = max(begins, first_row), min(begins + len(part.data), first_row + len(rows))
            offset, shape = part.global_offset[0] + begin - begins, part.global_shape
            if part.allow_shape_mismatch:  # rows beyond the vocabulary pad it to a multiple of the ranks
                end = min(end, begin + max(0, self._vocab_size - offset))
                shape = (self._vocab_size, *shape[1:])
            if begin >= end:
                continue
            data = rows.detach()[begin - first_row : end - first_row]
            described = replace(
                part,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=shape,
                global_offset=(offset, *part.global_offset[1:]),
                axis_fragmentations=None,
            )
            yield part.key, CheckpointableShardedTensor.from_sh_ten(described)


def _gathered(parts: _Parts, slots: list[Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copy the optimizer's state into host memory; collective over the ranks sharding it.

    These ranks gather one parameter after the other. The whole parameters are assigned to the ranks in turn, so that
    together they hold and write the sharded state once.
    """
    for number, slot in enumerate(slots):
        for kind in (MASTER, *MOMENTS):
            if slot.group is None or (kind == MASTER and slot.steps_on_parameter):
                kept = slot.parameter if kind == MASTER and slot.steps_on_parameter else slot.kept(kind)
                whole: torch.Tensor | None = host_copy(kept)
            else:
                whole = _whole(slot, kind, owner=number % slot.group.size())
            if whole is not None:
                yield from parts.of(slot, kind, whole)


def _whole(slot: Slot, kind: str, owner: int) -> torch.Tensor | None:
    """Gather a sharded tensor on one rank of the group; None on the others."""
    assert slot.group is not None
    whole = torch.zeros(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
    if slot.holds_some:
        whole[slot.begin : slot.begin + slot.size] = slot.kept(kind)
    # as integers, since 0.0 + -0.0 is 0.0
    dist.reduce(whole.view(torch.int32), dst=dist.get_global_rank(slot.group, owner), group=slot.group)
    return whole.view(slot.parameter.shape).cpu() if slot.group.rank() == owner else None


@dataclass(frozen=True)
class _Landing:
    """Memory to read an optimizer's tensor into: the rows of the parameter touched by its slice."""

    slot: Slot
    kind: str
    target: torch.Tensor
    rows: torch.Tensor
    first_row: int

    def entries(self, parts: _Parts) -> Entries:
        return parts.of(self.slot, self.kind, self.rows, self.first_row)

    def settle(self) -> None:
        """Copy the slice out of the rows."""
        if self.rows is not self.target:
            self.target.copy_(_slice_of(self.rows, self.first_row, self.slot))


def _slice_of(rows: torch.Tensor, first_row: int, slot: Slot) -> torch.Tensor:
    before = slot.begin - first_row * (rows.numel() // len(rows))
    return rows.view(-1)[before : before + slot.size]


def _landings(slot: Slot) -> Iterator[_Landing]:
    for kind in (MASTER, *MOMENTS):
        if not slot.holds_some or (kind == MASTER and slot.steps_on_parameter):
            continue  # the model's weights are read anyway
        target = slot.kept(kind).detach()
        if slot.group is None:
            yield _Landing(slot, kind, target, target, 0)
            continue
        shape = slot.parameter.shape
        width = shape[1:].numel()
        first, last = slot.begin // width, -(-(slot.begin + slot.size) // width)
        rows = torch.zeros((last - first, *shape[1:]), dtype=target.dtype)
        _slice_of(rows, first, slot).copy_(target)  # rows beyond the vocabulary are in no checkpoint
        yield _Landing(slot, kind, target, rows, first)
