"""Receiving end of a weight update, in each of the engine's ranks: tensors come by broadcast from the trainer.

vLLM's own backends need NCCL and a trainer with vLLM. This one joins the group of roll_r3's trainer: gloo on a CPU,
NCCL on GPUs. A layer is written once all of its tensors are there. So the memory besides the model is one request's
tensors and the unfinished layers.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from roll_r3_vllm.received import ReceivedNames

JOIN_TIMEOUT = 120.0
"""Seconds to join the group."""
_EXPERT_BIAS = "e_score_correction_bias"
"""Parameter that vLLM does not count among the received elements of a layer."""


# The module that the trainer joins with, by path: this interpreter need not have roll_r3.
_SHARED = runpy.run_path(str(Path(__file__).parents[4] / "weights" / "group.py"))
join_group, leave_group = _SHARED["join_group"], _SHARED["leave_group"]
from_the_trainer = _SHARED["from_the_trainer"]


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Meeting point of the group's ranks."""

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of this engine's first device; its others follow."""
    world_size: int
    group_name: str
    backend: str
    """Backend of torch.distributed: "gloo" or "nccl"."""
    timeout_s: float
    """Limit of one broadcast, in seconds."""


@dataclass
class TensorsInfo(WeightTransferUpdateInfo):
    """Tensors of one request, in the order of its broadcasts."""

    names: list[str]
    """Names in a Hugging Face checkpoint."""
    dtypes: list[str]
    """torch names of the dtypes."""
    shapes: list[list[int]]
    """Shapes of whole tensors, not of a rank's part."""


class GroupWeights(WeightTransferEngine[JoinInfo, TensorsInfo]):
    """Methods called by vLLM in each rank: join once; then per update start, any number of receives, finish."""

    init_info_cls, update_info_cls = JoinInfo, TensorsInfo

    _group: dist.ProcessGroup | None = None
    _names: ReceivedNames

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group, and leave that of an earlier trainer."""
        self.shutdown()
        self._names = ReceivedNames()
        store = TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            False,
            timedelta(seconds=JOIN_TIMEOUT),
        )
        self._group = join_group(
            store,
            init_info.group_name,
            rank=init_info.rank_offset + get_tp_group().rank_in_group,
            world_size=init_info.world_size,
            backend=init_info.backend,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        self._names.begin()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TensorsInfo) -> None:
        """Receive the named tensors and pass them to the model's own loader.

        Raises:
            ValueError: a name unknown to the model, or already in this update.
        """
        if self._group is None:
            raise RuntimeError("this rank has not joined the group")
        self._names.add(update_info.names)
        named = zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True)
        received = [
            (name, torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)) for name, dtype, shape in named
        ]
        works = [self._group.broadcast([tensor], from_the_trainer()) for _, tensor in received]
        for work in works:
            work.wait()
        with torch.no_grad():
            self.model.load_weights(received)

    def finish_weight_update(self) -> None:
        """Write the unfinished layers.

        Raises:
            ValueError: tensors are missing; vLLM would use whatever its memory held.
        """
        if missing := self._names.missing():
            raise ValueError(f"{len(missing)} tensors of the first update never came: {', '.join(missing[:5])} ...")
        if lacking := unfinished_layers(self.model):
            raise ValueError(f"weights of {len(lacking)} layers are incomplete: {', '.join(lacking[:5])} ...")
        biases = sum(name.endswith(_EXPERT_BIAS) for name, _ in self.model.named_parameters())
        if (came := self._names.ending_in(_EXPERT_BIAS)) < biases:
            raise ValueError(f"{came} tensors {_EXPERT_BIAS} came, the model has {biases}")
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            if _is_tied(self.model, layer):  # a CPU kernel holds a copy of the previous weights
                layer.quant_method.process_weights_after_loading(layer)
        self._names.finish()

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            leave_group(group)


def unfinished_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the modules that an update did not fill.

    With a padded vocabulary an embedding is never filled entirely, and a tied output layer has no weights of its own.
    """
    lacking = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or not any(p is not None for p in layer._parameters.values()):
            continue
        if is_deferred_attention_layer(layer):  # its only parameters are scales, absent from most checkpoints
            continue
        if _is_tied(model, layer):
            continue
        if isinstance(layer, VocabParallelEmbedding):
            complete = info.load_numel > 0
        else:
            complete = info.load_numel >= info.load_numel_total
        if not complete:
            lacking.append(name)
    return lacking


def _is_tied(model: torch.nn.Module, layer: torch.nn.Module) -> bool:
    """Return True for the output layer of a model that shares the embedding's weights."""
    return isinstance(layer, ParallelLMHead) and bool(getattr(model.config, "tie_word_embeddings", False))
