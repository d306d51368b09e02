"""Checkpoints to go on from: every rank writes its part of a snapshot, and any number of ranks reads them.

The files are safetensors, headers and all: nothing of a checkpoint is ever unpickled.
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
from roll_r3.trainers.together import together

State = dict[str, torch.Tensor]
"""Name -> a tensor that is the same on every rank, or one of which this rank has a part: a DTensor, or what else tells
torch.distributed.checkpoint its part. The shape is the whole tensor's; of each name a rank has one part at most."""


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the host's memory, which no step of the optimizer writes into; of a DTensor a DTensor."""
    return tensor.detach().to("cpu", copy=True)


class Snapshot:
    """What every rank had at one moment, to be written while it trains on.

    It is a `strategies.base.Snapshot`.
    """

    def __init__(self, state: State) -> None:
        """Collective.

        Args:
            state: in the host's memory, and nobody else's (see `host_copy`).
        """
        self._state = state
        self._group = world.beside()

    def write(self, path: Path) -> None:
        """As `strategies.base.Snapshot.write`.

        A part that several ranks have is written by one of them, chosen so that all write about as much.
        """
        failing = f"the checkpoint {path} was not written"
        with together(RollError, failing, self._group):
            if path.exists():
                raise RollError(f"{path} is there already: a checkpoint never overwrites one")
        partial = path.with_name(f"{path.name}.partial")
        with together(RollError, failing, self._group):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            state_dict_saver.save(self._state, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            raise RollError(f"{failing}: {_reasons(error)}") from error
        with together(RollError, failing, self._group):
            if dist.get_rank() == 0:
                os.rename(partial, path)


def load(states: Sequence[State], path: Path, *, within: str = "") -> None:
    """Read a checkpoint into the tensors of `states`; collective.

    Nothing is written into them before every header was found to be right.

    Args:
        states: more than one where a tensor of the checkpoint goes to several places.
        within: only what is so named is looked at; the checkpoint may hold more beside it.

    Raises:
        ConfigError: no checkpoint at `path`, one of another model, or one that cannot be read; on every rank. Where
            what fails is reading past the headers, some tensors of `states` are the checkpoint's by then.
    """
    failing = f"{path} is no checkpoint of this model"
    reader = HuggingFaceStorageReader(str(path))
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, {name for state in states for name in state})
    with together(ConfigError, failing):
        if not path.is_dir():
            raise ConfigError("there is no such directory")
        metadata = reader.read_metadata()
        for state in states:
            _check(state, metadata, set().union(*names), within)
    for state in states:
        try:
            state_dict_loader.load(state, storage_reader=reader)
        except CheckpointException as error:
            raise ConfigError(f"{path} cannot be read: {_reasons(error)}") from error


def _check(state: State, metadata: Metadata, names: set[str], within: str) -> None:
    """Raises ConfigError: the files hold other tensors than the model, or not all parts of one.

    Args:
        names: of all ranks.
    """
    held = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    for name, m in held.items():
        if name not in names and name.startswith(within):
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
