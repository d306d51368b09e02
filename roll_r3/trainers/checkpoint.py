"""Training checkpoints: every rank writes its part of a snapshot, and any number of ranks can read them.

All files are safetensors: nothing of a checkpoint is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from roll_r3.errors import ConfigError, RollError
from roll_r3.trainers import world
from roll_r3.trainers.all_ranks import raise_on_all_ranks

State = dict[str, torch.Tensor]
"""Name -> a tensor equal on every rank, or this rank's part of one: a DTensor, or another type with a description for
torch.distributed.checkpoint. The shape is the whole tensor's; a rank has at most one part per name."""


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory, safe from later optimizer steps; a DTensor stays a DTensor."""
    return tensor.detach().to("cpu", copy=True)


class Snapshot:
    """State of every rank at one moment, written during later training (a `strategies.base.Snapshot`)."""

    def __init__(self, state: State) -> None:
        """Collective.

        Args:
            state: copies in host memory (see `host_copy`).
        """
        self._state = state
        self._group = world.side_group()

    def write(self, path: Path) -> None:
        """As `strategies.base.Snapshot.write`.

        A part held by several ranks is written by one of them, balanced so that all write about the same amount.
        """
        failing = f"the checkpoint {path} was not written"
        with raise_on_all_ranks(RollError, failing, self._group):
            if path.exists():
                raise RollError(f"{path} already exists: a checkpoint never overwrites another")
        partial = path.with_name(f"{path.name}.partial")
        with raise_on_all_ranks(RollError, failing, self._group):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            state_dict_saver.save(self._state, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            raise RollError(f"{failing}: {_reasons(error)}") from error
        with raise_on_all_ranks(RollError, failing, self._group):
            if dist.get_rank() == 0:
                os.rename(partial, path)


def load(states: Sequence[State], path: Path, *, within: str = "") -> None:
    """Read a checkpoint into the tensors of `states`; collective.

    All headers are checked before any tensor is changed.

    Args:
        states: several, if a tensor of the checkpoint is read into several places.
        within: prefix of the names to read; the checkpoint may contain others.

    Raises:
        ConfigError: no checkpoint at `path`, one of another model, or an unreadable one; on every rank. If reading
            fails after the headers, some tensors of `states` already have the checkpoint's values.
    """
    failing = f"{path} is not a checkpoint of this model"
    reader = HuggingFaceStorageReader(str(path))
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, {name for state in states for name in state})
    with raise_on_all_ranks(ConfigError, failing):
        if not path.is_dir():
            raise ConfigError("the directory does not exist")
        metadata = reader.read_metadata()
        for state in states:
            _check(state, metadata, set().union(*names), within)
    for state in states:
        try:
            state_dict_loader.load(state, storage_reader=reader)
        except CheckpointException as error:
            raise ConfigError(f"{path} cannot be read: {_reasons(error)}") from error


def _check(state: State, metadata: Metadata, names: set[str], within: str) -> None:
    """Raise ConfigError if the files hold other tensors than the model, or not all parts of one.

    Args:
        names: tensor names of all ranks.
    """
    held = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    for name, m in held.items():
        if name not in names and name.startswith(within):
            raise ConfigError(f"it has {name}, unknown to this model")
        if sum(prod(chunk.sizes) for chunk in m.chunks) != prod(m.size):
            raise ConfigError(f"it is incomplete: a file with a part of {name} is missing")
    for name, tensor in state.items():
        if name not in held:
            raise ConfigError(f"it has no {name}")
        if tensor.shape != held[name].size:
            raise ConfigError(f"{name} has shape {list(held[name].size)}, but {list(tensor.shape)} in this model")


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
