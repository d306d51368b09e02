"""The receiving end of a weight update in each of the engine's ranks: tensors come by broadcast from the trainer.

vLLM's own backends need NCCL and a trainer that has vLLM. This one takes the group that roll_r3's trainer offers every
engine, over gloo on a CPU and over NCCL on GPUs. A layer is written once all of its tensors are there, so what is held
besides the model is one request's tensors and the layers that it left unfinished.
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
"""Seconds."""
_EXPERT_BIAS = "e_score_correction_bias"
"""A parameter that vLLM leaves out when it counts what a layer has received."""


# The module that the trainer joins with, by path: this interpreter need not have roll_r3.
_SHARED = runpy.run_path(str(Path(__file__).parents[4] / "weights" / "group.py"))
join_group, leave_group = _SHARED["join_group"], _SHARED["leave_group"]
from_the_trainer = _SHARED["from_the_trainer"]


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Where the group's ranks meet."""

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of this engine's first device; its others follow."""
    world_size: int
    group_name: str
    backend: str
    """Of torch.distributed: "gloo" or "nccl"."""
    timeout_s: float
    """Limit of one broadcast, in seconds."""


@dataclass
class TensorsInfo(WeightTransferUpdateInfo):
    """What one request brings, in the order of its broadcasts."""

    names: list[str]
    """As in a Hugging Face checkpoint."""
    dtypes: list[str]
    """torch names."""
    shapes: list[list[int]]
    """Of whole tensors, not of a rank's part."""


class GroupWeights(WeightTransferEngine[JoinInfo, TensorsInfo]):
    """vLLM calls these methods in each rank: join once; then per update start, any number of receives, finish."""

    init_info_cls, update_info_cls = JoinInfo, TensorsInfo

    _group: dist.ProcessGroup | None = None
    _names: ReceivedNames

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group; the trainer of an earlier run is left behind."""
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
        """Receive the named tensors and hand them to the model's own loader.

        Raises:
            ValueError: a name that the model has not, or that this update has brought already.
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
        """Write what was left unfinished.

        Raises:
            ValueError: tensors are missing; vLLM would go on with what its memory held.
        """
        if missing := self._names.missing():
            raise ValueError(
                f"{len(missing)} tensors that the first update brought never came: {', '.join(missing[:5])} ..."
            )
        if lacking := unfinished_layers(self.model):
            raise ValueError(f"weights of {len(lacking)} layers never came whole: {', '.join(lacking[:5])} ...")
        biases = sum(name.endswith(_EXPERT_BIAS) for name, _ in self.model.named_parameters())
        if (came := self._names.ending_in(_EXPERT_BIAS)) < biases:
            raise ValueError(f"{came} tensors {_EXPERT_BIAS} came, the model has {biases}")
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            if _is_tied(self.model, layer):  # a CPU's kernel holds a copy of its own, of the weights before
                layer.quant_method.process_weights_after_loading(layer)
        self._names.finish()

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            leave_group(group)


def unfinished_layers(model: torch.nn.Module) -> list[str]:
    """Names of the modules that an update has not filled.

    Where the vocabulary is padded less than the whole is all there is, and a tied output layer has nothing of its own.
    """
    lacking = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or not any(p is not None for p in layer._parameters.values()):
            continue
        if is_deferred_attention_layer(layer):  # its only parameters are scales that checkpoints seldom have
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
    """Whether a layer is the output layer of a model whose embedding has its weights."""
    return isinstance(layer, ParallelLMHead) and bool(getattr(model.config, "tie_word_embeddings", False))
