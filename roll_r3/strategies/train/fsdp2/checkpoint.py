"""Checkpoints to go on from: every rank writes its part, and any number of ranks reads them.

The files are safetensors, headers and all: nothing of a checkpoint is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from roll_r3.errors import ConfigError, RollError

State = dict[str, torch.Tensor]


def save(state: State, path: Path) -> None:
    """Write `state` under `path`, which appears only when all of it is there; collective.

    Args:
        state: DTensors, of which each rank writes its part, and tensors that are the same on every rank.
        path: a directory to make, on a disk that all ranks share.

    Raises:
        RollError: there is something at `path`, or a rank could not write; on every rank.
    """
    if _anywhere(path.exists()):
        raise RollError(f"{path} is there already: a checkpoint never overwrites one")
    partial = path.with_name(f"{path.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        state_dict_saver.save(state, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except CheckpointException as error:
        raise RollError(f"the checkpoint {path} was not written: {_reasons(error)}") from error
    if dist.get_rank() == 0:
        os.rename(partial, path)
    dist.barrier()


def load(state: State, path: Path) -> None:
    """Read a checkpoint into the tensors of `state`; collective.

    Raises:
        ConfigError: no checkpoint at `path`, or one of another model; on every rank.
    """
    if _anywhere(not path.is_dir()):
        raise ConfigError(f"{path} is no checkpoint: there is no such directory")
    reader = HuggingFaceStorageReader(str(path))
    if lacking := _lacking(reader.read_metadata()):
        raise ConfigError(f"{path} is not whole: a file that holds a part of {lacking[0]} is not there")
    try:
        state_dict_loader.load(state, storage_reader=reader)
    except CheckpointException as error:
        raise ConfigError(f"{path} is no checkpoint of this model: {_reasons(error)}") from error


def _lacking(metadata: Metadata) -> list[str]:
    """Tensors of which parts are not there, as far as those show that are."""
    tensors = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    return [name for name, m in tensors.items() if sum(prod(chunk.sizes) for chunk in m.chunks) != prod(m.size)]


def _anywhere(found: bool) -> bool:
    """Whether a rank found it; collective."""
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, found)
    return any(answers)


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
