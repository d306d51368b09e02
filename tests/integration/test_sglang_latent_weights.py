"""New weights of latent attention, sent in the smallest possible buckets, into a real SGLang server at fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rollout_cases import Reference, requests, trajectories
from safetensors.torch import load_file
from sglang_cases import Engine, configuration

from roll_r3.engines.sglang.weights import SglangWeightChannel
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    old, new = (make_tiny_checkpoint(tmp_path / str(seed), "deepseek_v3", seed=seed) for seed in (0, 1))
    return old, new


@pytest.fixture
def engine(checkpoints: tuple[Path, Path], tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(configuration(checkpoints[0], "float32"), tmp_path / "server.log")
    try:
        engine.run(engine.rollout.start())
        yield engine
    finally:
        engine.close()


def assert_equals_transformers(engine: Engine, checkpoint: Path) -> None:
    reference = Reference(checkpoint)
    for t in trajectories(engine.generate(requests(6, 2))).values():
        np.testing.assert_allclose(t.log_probs, reference.log_probs(t), atol=1e-4, rtol=0)


def test_weights_arrive_whole_one_bucket_per_tensor(engine: Engine, checkpoints: tuple[Path, Path]) -> None:
    """Send the two down-projections fused by SGLang in both orders."""
    old, new = checkpoints
    channel = SglangWeightChannel([engine.rollout.weight_target()], device="cpu", timeout_s=60.0)
    try:
        for version, checkpoint in enumerate((new, old), start=1):
            tensors = list(load_file(checkpoint / "model.safetensors").items())
            channel.begin(version)
            for bucket in channel.buckets(tensors if checkpoint is new else reversed(tensors), 1):
                channel.send(bucket)
            channel.end()
            engine.run(engine.rollout.on_weights_updated(version))
            assert_equals_transformers(engine, checkpoint)
    finally:
        channel.close()
