"""Reading a checkpoint's tensors into transformers' modules, one parameter at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from roll_r3.errors import ConfigError
from roll_r3.models.architectures.base import Architecture
from roll_r3.models.checkpoint_files import tensor_files
from roll_r3.models.hf.tensor_parts import parts_of


class CheckpointReader:
    """The safetensors of a checkpoint directory; files are opened once and mapped, not read whole.

    Example:
        with CheckpointReader(path) as checkpoint:
            checkpoint.fill(tensor, "model.layers.0.mlp.experts.down_proj", architecture)
    """

    def __init__(self, path: Path) -> None:
        """Raise ConfigError for a directory without safetensors."""
        self._path = path
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._files = tensor_files(path)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fill(self, tensor: torch.Tensor, name: str, architecture: Architecture) -> None:
        """Copy a module's tensor from its parts, cast to its dtype.

        Raises:
            ConfigError: a part is missing, or has another shape.
        """
        for part, index in parts_of(name, tensor.shape, architecture):
            if part not in self._files:
                raise ConfigError(f"{self._path} has no tensor {part}, a part of transformers' {name}")
            target, found = tensor[index], self._file(self._files[part]).get_tensor(part)
            if target.shape != found.shape:
                raise ConfigError(
                    f"{part} of {self._path} is {list(found.shape)}, but config.json requires {list(target.shape)}"
                )
            target.copy_(found)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(safe_open(self._path / name, framework="pt"))
        return self._open[name]
