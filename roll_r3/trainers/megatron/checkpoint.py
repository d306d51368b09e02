"""What a checkpoint of a megatron model holds: whole tensors by name, and which part of each this rank has.

Megatron says of each parameter which part of which whole tensor it is (`sharded_state_dict`), as for its own
checkpoints. The files are not its own: those are partly pickles, and what its optimizers write depends on their kind
and on the layout. Here every weight and each of Adam's moments is a whole fp32 tensor, whatever layout and optimizer
have it in parts, so that any of them can read what any of them has written.

Names are megatron's, under `model.` and `optimizer.`, with the numbers of layers and experts counted over all ranks.
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
"""What an optimizer keeps of a parameter besides Adam's moments: the weights that it steps on."""
DONE = "optimizer.done"
"""int64 [1]: optimizer steps taken so far, by which Adam corrects its moments and the learning rate is found."""

_ONE_NAME_EACH = {"non_homogeneous_layers": True, "singleton_local_shards": True}
"""Has megatron name every layer, expert and half of a gated projection by itself: a rank has one part of a name."""


def snapshot(model: MegatronModel, optimizer: Optimizer) -> Snapshot:
    """Weights, buffers, moments and the number of steps, as they are now; collective."""
    parts = _Parts(model)
    done = (DONE, torch.tensor([optimizer.done]))
    return Snapshot(_merged(parts.copied_buffers(), _gathered(parts, optimizer.slots()), [done]))


def load(model: MegatronModel, optimizer: Optimizer, path: Path) -> None:
    """Go on from what a snapshot wrote under whatever layout; collective. Raises as `checkpoint.load`."""
    parts, done = _Parts(model), torch.tensor([0])
    landings = [landing for slot in optimizer.slots() for landing in _landings(slot)]
    kept = [entry for landing in landings for entry in landing.entries(parts)]
    checkpoint.load([parts.weights(), _merged(kept, [(DONE, done)])], path)
    for landing in landings:
        landing.settle()
    optimizer.resume(int(done))


def load_weights(model: MegatronModel, path: Path) -> None:
    """Read the weights and buffers alone; collective. Raises as `checkpoint.load`."""
    checkpoint.load([_Parts(model).weights()], path, within=WEIGHTS)


Entries = Iterable[tuple[str, torch.Tensor]]


def _merged(*entries: Entries) -> State:
    """Of each name a rank has one part at most: of two, one would be lost."""
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
        """Megatron takes a module that does not describe its parameters for one that has copies of them."""
        is_split = getattr(self.tensor, "tensor_model_parallel", False) and get_tensor_model_parallel_world_size() > 1
        for part, _ in self.parts(""):
            assert not is_split or ".experts." in part.key or part.local_shape != part.global_shape, (
                f"{part.key} is split over tensor-parallel ranks, and described as whole"
            )

    def parts(self, prefix: str, suffix: str = "") -> Iterator[tuple[ShardedTensor, int]]:
        """Its parts of whole tensors, and the row of `tensor` that each begins with.

        There are several where megatron fuses projections.
        """
        if isinstance(self.described, ShardedTensorFactory):
            built = list(nested_values([self.described.build()]))
        else:
            built = [self.described]
        for part in built:
            before = part.data.storage_offset() - self.tensor.storage_offset()
            yield replace(part, key=f"{prefix}{plain_norms(part.key)}{suffix}"), before // self.tensor.stride(0)


class _Parts:
    """The parts of a model that this rank has."""

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
        """Copies of what of it no optimizer has."""
        for held in self._held:
            if not isinstance(held.tensor, torch.nn.Parameter):
                yield from self._entries(held, host_copy(held.tensor), WEIGHTS)

    def of(self, slot: Slot, kind: str, rows: torch.Tensor, first_row: int = 0) -> Entries:
        """What an optimizer keeps of a parameter.

        Args:
            kind: `MASTER`, or one of `MOMENTS`.
            rows: of the parameter's shape, or some rows of it.
            first_row: the row of the parameter that `rows` begins with.
        """
        held = self._by_id[id(slot.parameter)]
        names = (WEIGHTS, "") if kind == MASTER else ("optimizer.", f".{kind}")
        return self._entries(held, rows, *names, first_row=first_row)

    def _entries(
        self, held: _Held, rows: torch.Tensor, prefix: str, suffix: str = "", first_row: int = 0
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, what torch.distributed.checkpoint takes for a part), `rows` being its memory."""
        for part, begins in held.parts(prefix, suffix):
            begin, end = max(begins, first_row), min(begins + len(part.data), first_row + len(rows))
            offset, shape = part.global_offset[0] + begin - begins, part.global_shape
            if part.allow_shape_mismatch:  # rows beyond the vocabulary fill it up to a multiple of the ranks
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
    """Copies of what the optimizer keeps, in the host's memory; collective over the ranks that share out its state.

    Such ranks put one parameter after the other together, and each keeps the whole of every so-manieth: together they
    hold and write what they held in slices.
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
    """Put together on one rank of the group; None on the others."""
    assert slot.group is not None
    whole = torch.zeros(slot.parameter.numel(), dtype=torch.float32, device=slot.parameter.device)
    if slot.holds_some:
        whole[slot.begin : slot.begin + slot.size] = slot.kept(kind)
    # as integers, since 0.0 + -0.0 is 0.0
    dist.reduce(whole.view(torch.int32), dst=dist.get_global_rank(slot.group, owner), group=slot.group)
    return whole.view(slot.parameter.shape).cpu() if slot.group.rank() == owner else None


@dataclass(frozen=True)
class _Landing:
    """Where something that an optimizer keeps is read into: the rows of the parameter that its slice touches."""

    slot: Slot
    kind: str
    target: torch.Tensor
    rows: torch.Tensor
    first_row: int

    def entries(self, parts: _Parts) -> Entries:
        return parts.of(self.slot, self.kind, self.rows, self.first_row)

    def settle(self) -> None:
        """Take the slice out of the rows."""
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
