"""The whole policy under Hugging Face names, on the first rank, from one copy of every weight.

Data-parallel copies are equal, so only the first one takes part. Parts are gathered on the first rank of each pipeline
stage, and sent from there to the first rank of the world. No rank holds more than its own weights and one parameter
(under expert parallelism, this parameter for one expert per expert-parallel rank). All operations use megatron's
groups, so no rank needs a connection beyond those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from roll_r3.trainers.megatron.bridge import PlainNames, TableBridge

Gather = Callable[[torch.Tensor, dist.ProcessGroup], Sequence[torch.Tensor]]
"""(tensor, group) -> the tensors of all its ranks, on its first rank; nothing on the others."""


class WeightExport:
    """Gathers the weights of one model; every rank makes one and drains `tensors` together."""

    def __init__(self, bridge: TableBridge, chunks: Sequence[torch.nn.Module]) -> None:
        self._bridge = bridge
        self._chunks = chunks
        self._stages: list[list[tuple[str, torch.Size, torch.dtype]]] | None = None
        """Name, shape and dtype of the tensors sent by the first rank of every stage; collected once."""

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the checkpoint, whole tensor) on the first rank of the world, nothing on others; collective."""
        held = self._stage(_gathered)
        if not _is_first_of_stage():
            for _ in held:
                pass
            return
        stage, group = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_group()
        if self._stages is None:
            own = [(name, tensor.shape, tensor.dtype) for name, tensor in self._stage(_imagined)]
            self._stages = [[] for _ in range(group.size())]
            dist.all_gather_object(self._stages, own, group=group)
        if stage:
            for _, tensor in held:
                _move(dist.isend, tensor.contiguous(), 0, group)
            return
        yield from held
        device = next(self._chunks[0].parameters()).device
        for other, described in enumerate(self._stages[1:], start=1):
            for name, shape, dtype in described:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                _move(dist.irecv, tensor, other, group)
                yield name, tensor

    def _stage(self, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
        """This stage's tensors on its first rank, nothing on others."""
        for chunk in map(PlainNames, self._chunks):
            names = self._bridge._weight_name_mapping_mcore_local_to_global(chunk, consider_ep=False)
            for name, tensor in (*chunk.named_parameters(), *chunk.expert_biases()):
                if ".mlp.experts.linear_fc" in name:
                    yield from self._of_experts(names[name], tensor, gather)
                elif mpu.get_data_parallel_rank(with_context_parallel=True) == 0:
                    yield from self._of_all(names[name], tensor, gather)

    def _of_all(self, name: str, part: torch.Tensor, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
        if getattr(part, "tensor_model_parallel", False):
            parts = gather(part, mpu.get_tensor_model_parallel_group())
            whole = self._bridge._weight_merge_across_tp(name, list(parts), part) if parts else None
        else:
            whole = part if mpu.get_tensor_model_parallel_rank() == 0 else None
        if whole is not None:
            yield from self._under_checkpoint_names(name, whole)

    def _of_experts(self, name: str, part: torch.Tensor, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
        """One parameter of one expert per expert-parallel rank: the expert with this local number."""
        if mpu.get_expert_data_parallel_rank():
            return
        parts = gather(part, mpu.get_expert_tensor_parallel_group())
        if not parts:
            return
        prefix, _, number = name.rpartition("weight")
        group = mpu.get_expert_model_parallel_group()
        on_each_rank = self._bridge.config.num_moe_experts // group.size()
        whole = gather(self._bridge._weight_merge_across_tp(name, list(parts), part), group)
        for rank, tensor in enumerate(whole):
            yield from self._under_checkpoint_names(f"{prefix}weight{rank * on_each_rank + int(number)}", tensor)

    def _under_checkpoint_names(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from zip(*self._bridge._weight_to_hf_format(name, tensor.detach()), strict=True)


def _is_first_of_stage() -> bool:
    """True on the first rank of its tensor-parallel group and of all copies; it is then first for experts too."""
    first: bool = (
        mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    return first


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> Sequence[torch.Tensor]:
    if group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor.contiguous(), parts, group=group, group_dst=0)
    return parts or []


def _imagined(tensor: torch.Tensor, group: dist.ProcessGroup) -> Sequence[torch.Tensor]:
    """Tensors without content, to find their shapes."""
    return [torch.empty_like(tensor, device="meta") for _ in range(group.size())]


def _move(
    operation: Callable[..., dist.Work | None], tensor: torch.Tensor, peer: int, group: dist.ProcessGroup
) -> None:
    """Send to, or receive from, a rank of the group. A batched operation uses the group's own communicator."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, group=group, group_peer=peer)]):
        work.wait()
