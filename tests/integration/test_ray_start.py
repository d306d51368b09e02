"""Ray that does not start."""

from __future__ import annotations

import time

import pytest
from faults import Fault, nothing_left

from roll_r3.cluster.placement import ray_cluster
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import LostWorkerError


@pytest.mark.fault("Ray cannot start")
def test_it_is_said_in_words(fault: Fault, tmp_path, monkeypatch):
    """Its directory is a file."""
    (tmp_path / "ray").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = RLVRConfig(exp_name="x", pretrain="p", max_steps=1, actor_train={}, actor_infer={})
    began = time.monotonic()
    said = pytest.raises(LostWorkerError, match=r"Ray did not start here: \w+: .*\nits own logs are")
    with nothing_left(), said, ray_cluster(config):
        pass
    fault.recovered(time.monotonic() - began)
    fault.user_sees("error: Ray did not start here: ..., and where its logs are; exit status 1")
    fault.lost("nothing; a run that has made no step does not try again by itself")
