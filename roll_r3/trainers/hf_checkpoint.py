"""Writing exported weights as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from roll_r3.config.findings.report import show_value
from roll_r3.errors import CheckpointError, ConfigError
from roll_r3.models.checkpoint_files import INDEX, own_file, tensor_files

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 << 30
"""Maximum size of a file of a saved checkpoint."""
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_OUTPUT = "lm_head.weight"
"""Missing from the exported weights if tied to the embedding; the source's copy would be the untrained one."""


def save_hf(weights: Iterator[tuple[str, torch.Tensor]], source: Path, path: Path) -> dict[str, int]:
    """Write the weights, config and tokenizer as a Hugging Face checkpoint, on rank 0; collective.

    Args:
        weights: (name, whole tensor) pairs, the same on every rank. The iterator may be collective, so all ranks drain
            it.
        source: the initial checkpoint of the weights.
        path: a directory, created if missing.

    Returns:
        Size in bytes of each file, by name, after fsync; on rank 0, and nothing on the others.

    Raises:
        CheckpointError: writing failed (a full disk, for example), or the source is unreadable; on rank 0, while the
            others wait.
    """
    written: dict[str, int] = {}
    if dist.get_rank() == 0:
        try:
            _write_checkpoint(weights, source, path)
            written = _synced(path)
        except (OSError, SafetensorError, ConfigError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
    else:
        for _ in weights:
            pass
    dist.barrier()
    return written


def _write_checkpoint(weights: Iterator[tuple[str, torch.Tensor]], source: Path, path: Path) -> None:
    """Write weights as safetensors with an index, and copy all other files of the source checkpoint.

    Tensors of the source unknown to the trainer (multi-token-prediction layers) are copied unchanged. Links to files
    outside the checkpoint are skipped: the target may be a private file, and the result may be published.
    """
    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.is_file() or any(file.match(pattern) for pattern in _WEIGHT_FILES):
            continue
        if own := own_file(source, file.name):
            shutil.copyfile(own, path / file.name)
        else:
            _log_skipped(file, "it is")
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: dict[str, int] = {}
    size = total = 0
    for name, tensor in _with_the_rest(weights, source):
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
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _with_the_rest(weights: Iterator[tuple[str, torch.Tensor]], source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The given weights, then the source's remaining ones."""
    written = set()
    for name, tensor in weights:
        written.add(name)
        yield name, tensor
    rest = {name: file for name, file in tensor_files(source).items() if name not in written and name != _OUTPUT}
    for file in sorted(set(rest.values())):
        names = [name for name, holds in rest.items() if holds == file]
        if not (own := own_file(source, file)):
            _log_skipped(source / file, f"its {len(names)} tensors unknown to the trainer are")
            continue
        with safe_open(own, framework="pt") as tensors:
            for name in names:
                yield name, tensors.get_tensor(name)


def _log_skipped(file: Path, what: str) -> None:
    logger.warning(
        "%s is a link out of %s, so %s not exported: put the file itself there if it belongs to the model",
        show_value(file.name),
        file.parent,
        what,
    )


def _synced(path: Path) -> dict[str, int]:
    """Sync the files of a directory to disk; size in bytes of each, by name."""
    for entry in [*path.iterdir(), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return {file.name: file.stat().st_size for file in path.iterdir()}


def _write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / _shard_name(number, None), metadata={"format": "pt"})


def _shard_name(number: int, count: int | None) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count else f"model-{number:05d}.safetensors"
