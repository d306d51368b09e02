"""Death of a real vLLM engine during its requests; see test_engine_faults.py for SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_world import Kind, World, killed_under_its_requests
from faults import Fault, nothing_left
from vllm_cases import HEAD_DIM, Engine, configuration, require_environment

from roll_r3.engines.vllm.weights import VllmWeightChannel
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.vllm, pytest.mark.timeout(1200)]

VLLM = Kind(Engine, VllmWeightChannel, "EngineCore")


@pytest.mark.fault("a rollout server of vLLM is killed while it generates")
def test_a_server_killed_under_its_requests_is_started_again(fault: Fault, tmp_path: Path) -> None:
    require_environment()
    old, new = (
        make_tiny_checkpoint(tmp_path / name, seed=seed, norm_noise=0.0, head_dim=HEAD_DIM)
        for name, seed in (("old", 0), ("new", 5))
    )
    config = configuration(old, "float32", response_length=24, max_concurrent_requests=8)
    with nothing_left():
        world = World(VLLM, config, new, tmp_path)
        try:
            killed_under_its_requests(fault, world)
        finally:
            world.close()
