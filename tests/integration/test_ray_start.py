"""Failing start of Ray."""

from __future__ import annotations

import signal
import time

import pytest
from faults import Fault, nothing_left
from whole_run import START_TIMEOUT, Run

from roll_r3.cluster.ray_session import ray_cluster
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.errors import LostWorkerError
from roll_r3.models.tiny import make_tiny_checkpoint


@pytest.mark.fault("Ray cannot start")
def test_it_is_said_in_words(fault: Fault, tmp_path, monkeypatch):
    """Put a file in the place of Ray's directory."""
    (tmp_path / "ray").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = RLVRConfig(exp_name="x", pretrain="p", max_steps=1, actor_train={}, actor_infer={})
    began = time.monotonic()
    said = pytest.raises(LostWorkerError, match=r"Ray did not start here: \w+: .*\nit got no directory: see RAY_T")
    with nothing_left(), said, ray_cluster(config):
        pass
    fault.recovered(time.monotonic() - began)
    fault.user_sees("error: Ray did not start here: ..., and where its logs are, or why it has none; exit status 1")
    fault.lost("nothing; without a step there is no restart")


@pytest.mark.parametrize("seconds", [0.3, 1.0])  # before the third of a second in which Ray's core has its own handler
def test_sigterm_while_it_starts_leaves_with_the_status_of_one(tmp_path, monkeypatch, seconds):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", examples=addition_mod10())
    with nothing_left():
        run = Run(tmp_path, checkpoint)
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while "starting Ray" not in run.stderr.read_text():
                assert time.monotonic() < deadline and run.process.poll() is None, run.stderr.read_text()
                time.sleep(0.05)
            time.sleep(seconds)
            run.process.send_signal(signal.SIGTERM)
            assert run.finish(60) == 128 + signal.SIGTERM, run.stderr.read_text()
        finally:
            run.end()
    assert "training ranks" not in run.stderr.read_text(), "it had not started yet"
