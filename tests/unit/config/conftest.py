from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from roll_r3.config.load import LoadedConfig, load

MINIMAL = """\
exp_name: demo
pretrain: some/checkpoint
rollout_batch_size: 16
num_return_sequences_in_group: 4
actor_train:
  router_replay: {mode: R3}
  data_args: {file_name: "bundled:demo"}
actor_infer:
  router_replay: {mode: R3}
"""
"""The smallest configuration that every rule accepts."""

LoadText = Callable[..., LoadedConfig]


@pytest.fixture
def load_text(tmp_path: Path) -> LoadText:
    """Load a configuration from text, with overrides."""

    def run(text: str = MINIMAL, *overrides: str) -> LoadedConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load(path, overrides)

    return run
