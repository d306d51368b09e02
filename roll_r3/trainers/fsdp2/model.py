"""Building transformers' model from a checkpoint, with its weights sharded over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from roll_r3.config.strategies import Fsdp2Config
from roll_r3.config.workers import ModelArgs
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import Architecture
from roll_r3.models.facts import read_facts
from roll_r3.models.hf.config import read_hf_config
from roll_r3.models.hf.head import compute_logits_in_fp32
from roll_r3.models.hf.norms import set_latent_epsilon
from roll_r3.models.hf.routers import find_routers
from roll_r3.models.hf.tensor_parts import parts_of
from roll_r3.trainers.all_ranks import raise_on_all_ranks
from roll_r3.trainers.fsdp2.routers import HookedRouter
from roll_r3.trainers.fsdp2.weights import CheckpointReader

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(eq=False)
class Fsdp2Model:
    """A model with a part of each weight on this rank, in fp32."""

    module: Any
    """The ...ForCausalLM, an `FSDPModule` like each of its decoder layers."""
    routers: list[HookedRouter]
    mesh: DeviceMesh
    """One-dimensional mesh of all ranks."""
    device: torch.device
    dtype: torch.dtype
    """Dtype of forward and backward, and of exported weights."""
    architecture: Architecture
    in_backward: bool = False
    """True during backward, and after a failed one: FSDP2 would treat the next pass as a part of it."""

    def reshard(self) -> None:
        """Free gathered weights, so that the next gather uses the updated ones."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def release(self) -> None:
        """Release the process group; the model cannot be used again.

        DTensor's caches keep the mesh forever, and with it the group and its threads. Only torch.compile uses the
        mesh's own registry of groups; everything else finds a group by name.
        """
        self.mesh._pg_registry.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """Memory of this rank's part of every weight, and of every persistent buffer."""
        weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        return weights | dict(persistent_buffers(self.module))

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Name in the checkpoint, whole tensor), the same on every rank; collective.

        Weights in the dtype of the model, buffers (an expert bias) in their own.
        """
        for name, parameter in self.module.named_parameters():
            weight = parameter.detach().to(self.dtype)
            assert isinstance(weight, DTensor)
            whole = weight.full_tensor()
            for part, index in parts_of(name, whole.shape, self.architecture):
                yield part, whole[index]
        for name, buffer in persistent_buffers(self.module):
            for part, index in parts_of(name, buffer.shape, self.architecture):
                yield part, buffer[index]


def build_model(
    model_path: str,
    model_args: ModelArgs,
    settings: Fsdp2Config,
    device: torch.device,
    *,
    trains: bool,
    fp32_lm_head: bool = False,
) -> Fsdp2Model:
    """Build the model without weights, then fill, broadcast and shard one layer after the other; collective.

    No rank holds more than its part of the weights and one layer. Only rank 0 reads the checkpoint.

    Args:
        fp32_lm_head: compute logits in fp32 for any dtype of the model.

    Raises:
        ConfigError: unknown architecture or router, quantized weights, a buffer without a tensor in the checkpoint, or
            missing or unreadable tensors; on every rank.
    """
    facts, config = read_facts(model_path), read_hf_config(model_path)
    architecture = ARCHITECTURES[facts.model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=settings.attn_implementation, trust_remote_code=False
        )
    # transformers gives the padding token's embedding no gradient, even if the token is in use
    model.model.embed_tokens.padding_idx = None
    set_latent_epsilon(model)
    recomputes = trains and settings.recompute
    routers = [
        HookedRouter(module, layer, recomputed=recomputes)
        for layer, module in zip(facts.moe_layers, find_routers(model, facts.moe_layers), strict=True)
    ]
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if fp32_lm_head:
        compute_logits_in_fp32(model)
    _fill_and_shard(model, Path(model_path), architecture, mesh, device, model_args, settings)
    return Fsdp2Model(model, routers, mesh, device, DTYPES[model_args.dtype], architecture)


def _fill_and_shard(
    model: Any,
    path: Path,
    architecture: Architecture,
    mesh: DeviceMesh,
    device: torch.device,
    args: ModelArgs,
    settings: Fsdp2Config,
) -> None:
    # gradients are summed in fp32; in bf16 the optimizer steps on fp32 masters, and bf16 copies of them are gathered
    compute = DTYPES[args.dtype] if args.dtype != "fp32" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    inner = model.model
    with raise_on_all_ranks(ConfigError, "the model was not built"):
        reader = CheckpointReader(path)
    with reader as checkpoint:
        for index, layer in enumerate(inner.layers):
            _fill([(f"model.layers.{index}.", layer)], checkpoint, architecture, device)
            fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=settings.reshard_after_forward)
        rest = [("model.embed_tokens.", inner.embed_tokens), ("model.norm.", inner.norm), ("lm_head.", model.lm_head)]
        if model.config.tie_word_embeddings:
            del rest[-1]
        _fill(rest, checkpoint, architecture, device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = inner.embed_tokens.weight
    with device:  # checkpoints do not contain its frequencies
        inner.rotary_emb = type(inner.rotary_emb)(model.config)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ConfigError(f"{path}: fsdp2 cannot fill {', '.join(left)}")
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is divided by its denominator over all ranks, so gradients are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _fill(
    modules: Sequence[tuple[str, torch.nn.Module]],
    checkpoint: CheckpointReader,
    architecture: Architecture,
    device: torch.device,
) -> None:
    """Fill modules from the checkpoint; rank 0 reads it.

    Args:
        modules: (prefix of the parameters' names in the model, module) pairs.

    Raises:
        ConfigError: a buffer without a tensor in the checkpoint, or a tensor missing or unreadable on rank 0; on every
            rank.
    """
    for prefix, module in modules:
        kept = dict(persistent_buffers(module))
        # to_empty would leave arbitrary memory in it, unnoticed
        if unknown := [prefix + name for name, _ in module.named_buffers() if name not in kept]:
            raise ConfigError(f"fsdp2 cannot fill {', '.join(unknown)}: checkpoints do not contain it")
        module.to_empty(device=device)
        tensors = [*module.named_parameters(), *persistent_buffers(module)]
        with raise_on_all_ranks(ConfigError, "the model was not built"), torch.no_grad():
            if dist.get_rank() == 0:
                for name, tensor in tensors:
                    checkpoint.fill(tensor, prefix + name, architecture)
        for _, tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of each buffer stored in checkpoints: an expert bias."""
    kept = module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]
