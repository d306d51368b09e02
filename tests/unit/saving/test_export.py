"""Weights for transformers that cannot be written."""

from __future__ import annotations

import resource

import pytest
import torch
import torch.distributed as dist

from roll_r3.errors import CheckpointError
from roll_r3.strategies.train.hf_checkpoint import save_hf


@pytest.fixture
def alone():
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [10, 4096], ids=["config", "weights"])
def test_a_full_disk_is_an_error_of_ours(alone, tmp_path, size):
    """Not a lost worker, after which a run would start again, to find the disk as full."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("x" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*File too large"):
            save_hf(iter([("weight", torch.zeros(4096))]), tmp_path / "source", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
