"""Hugging Face weights in and out of megatron's layers, through mbridge.

mbridge knows the parameter names of TransformerEngine layers; `_TransformerEngineNames` shows it local layers under
those names, so one table of names serves both.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mbridge import AutoBridge
from mbridge.core import LLMBridge
from safetensors.torch import save_file
from transformers import AutoConfig

from roll_r3.errors import ConfigError
from roll_r3.strategies.train.megatron.spec import local_block_spec

SHARD_BYTES = 5 << 30
"""Size at which a saved checkpoint starts another file."""
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def open_bridge(
    model_path: str,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype,
    tp_size: int,
    transformer_engine: bool,
    **overrides: Any,
) -> LLMBridge:
    """The bridge of a checkpoint, its TransformerConfig made; needs megatron's process groups.

    Args:
        overrides: TransformerConfig fields that win over what mbridge reads from the checkpoint.

    Raises:
        ConfigError: an architecture or a position encoding that mbridge cannot build here.
    """
    hf_config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if hf_config.model_type not in AutoBridge.list_supported_models():
        raise ConfigError(
            f"{model_path} has model_type {hf_config.model_type!r}, which mbridge does not convert to megatron; it "
            f"knows {', '.join(sorted(AutoBridge.list_supported_models()))}"
        )
    latent_attention = hasattr(hf_config, "kv_lora_rank")
    if latent_attention and not transformer_engine:
        raise ConfigError(
            f"{model_path} ({hf_config.model_type}) has latent attention, which needs TransformerEngine on a GPU"
        )
    # transformers 5 moved rope_theta into rope_parameters; mbridge reads the old place and ignores scaling
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" and not latent_attention:
        raise ConfigError(
            f"{model_path} scales its rotary embedding ({rope['rope_type']!r}), which mbridge would ignore: use a "
            "checkpoint without rope scaling"
        )
    if "rope_theta" in rope:
        hf_config.rope_theta = rope["rope_theta"]
    if hf_config.model_type in ("qwen2_moe", "qwen3_moe"):
        # gates that are not renormalised after top-k are megatron's softmax before top-k
        overrides["moe_router_pre_softmax"] = not hf_config.norm_topk_prob
    bridge = AutoBridge.from_config(hf_config, dtype=dtype, make_vocab_size_divisible_by=tp_size)
    bridge.set_extra_args(**overrides)
    if not transformer_engine:
        bridge.has_vp_stage = True
        bridge._get_transformer_layer_spec = lambda vp_stage=None: local_block_spec(bridge.config, vp_stage)
    return bridge


def load_weights(bridge: LLMBridge, chunks: Sequence[torch.nn.Module], model_path: str, local: bool) -> None:
    """Fill the chunks from the checkpoint; collective over tensor-parallel groups."""
    with torch.no_grad():
        bridge.load_weights([_TransformerEngineNames(chunk, local) for chunk in chunks], model_path)


def export_weights(
    bridge: LLMBridge, chunks: Sequence[torch.nn.Module], local: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint's files, whole tensor) on every rank; collective over all model-parallel groups."""
    with torch.no_grad():
        for name, tensor in bridge.export_weights([_TransformerEngineNames(chunk, local) for chunk in chunks]):
            yield name, tensor.detach()


class _TransformerEngineNames:
    """A chunk whose parameters go by the names that mbridge expects."""

    def __init__(self, chunk: torch.nn.Module, local: bool) -> None:
        model = unwrap(chunk)
        self.decoder = model.decoder
        self.config = model.config
        self._parameters = [(_bridge_name(name, local), value) for name, value in model.named_parameters()]
        self._state = {_bridge_name(n, local): v for n, v in model.state_dict().items() if v is not None}

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._parameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state


def _bridge_name(name: str, local: bool) -> str:
    if local:  # TransformerEngine fuses this norm into the projection that follows it
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", r"experts.\2.weight\1", name)


def unwrap(chunk: torch.nn.Module) -> Any:
    """The GPTModel inside megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def write_checkpoint(weights: Iterator[tuple[str, torch.Tensor]], source: Path, path: Path) -> None:
    """Write weights as safetensors with an index, and everything else of the source checkpoint beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(file, path / file.name)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: dict[str, int] = {}
    size = total = 0
    for name, tensor in weights:
        held = tensor.cpu().contiguous().clone()
        bytes_ = held.numel() * held.element_size()
        if size and size + bytes_ > SHARD_BYTES:
            _write_shard(path, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = held
        names[name] = len(shards)
        size, total = size + bytes_, total + bytes_
    _write_shard(path, len(shards), shards[-1])
    count = len(shards)
    for number in range(1, count + 1):
        (path / _shard_name(number, None)).rename(path / _shard_name(number, count))
    index = {"metadata": {"total_size": total}, "weight_map": {n: _shard_name(i, count) for n, i in names.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / _shard_name(number, None), metadata={"format": "pt"})


def _shard_name(number: int, count: int | None) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count else f"model-{number:05d}.safetensors"
