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
from roll_r3.strategies.train.fsdp2.together import together

State = dict[str, torch.Tensor]


def save(state: State, path: Path) -> None:
    """Write `state` under `path`, which appears only when all of it is there; collective.

    Args:
        state: DTensors, of which each rank writes its part, and tensors that are the same on every rank.
        path: a directory to make, on a disk that all ranks share.

    Raises:
        RollError: there is something at `path`, or a rank could not write; on every rank.
    """
    failing = f"the checkpoint {path} was not written"
    with together(RollError, failing):
        if path.exists():
            raise RollError(f"{path} is there already: a checkpoint never overwrites one")
    partial = path.with_name(f"{path.name}.partial")
    with together(RollError, failing):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        state_dict_saver.save(state, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except CheckpointException as error:
        raise RollError(f"{failing}: {_reasons(error)}") from error
    with together(RollError, failing):
        if dist.get_rank() == 0:
            os.rename(partial, path)


def load(state: State, path: Path) -> None:
    """Read a checkpoint into the tensors of `state`; collective.

    Nothing is written into them before every header was found to be right.

    Raises:
        ConfigError: no checkpoint at `path`, one of another model, or one that cannot be read; on every rank. Where
            what fails is reading past the headers, some tensors of `state` are the checkpoint's by then.
    """
    failing = f"{path} is no checkpoint of this model"
    reader = HuggingFaceStorageReader(str(path))
    with together(ConfigError, failing):
        if not path.is_dir():
            raise ConfigError("there is no such directory")
        _check(state, reader.read_metadata())
    try:
        state_dict_loader.load(state, storage_reader=reader)
    except CheckpointException as error:
        raise ConfigError(f"{path} cannot be read: {_reasons(error)}") from error


def _check(state: State, metadata: Metadata) -> None:
    """Raises ConfigError: the files hold other tensors than `state`, or not all parts of one."""
    held = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    for name, m in held.items():
        if name not in state:
            raise ConfigError(f"it holds {name}, which this model has not")
        if sum(prod(chunk.sizes) for chunk in m.chunks) != prod(m.size):
            raise ConfigError(f"it is not whole: a file that holds a part of {name} is not there")
    for name, tensor in state.items():
        if name not in held:
            raise ConfigError(f"it has no {name}")
        if tensor.shape != held[name].size:
            raise ConfigError(f"{name} has shape {list(held[name].size)}, in this model {list(tensor.shape)}")


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
