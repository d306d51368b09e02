"""Devices of a run, without a cluster: the test answers in place of Ray."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import ray

from roll_r3.cluster import placement
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError, LostWorkerError

CONFIG = RLVRConfig(exp_name="x", pretrain="p", max_steps=1, actor_train={}, actor_infer={})


@pytest.mark.parametrize("other", ["actor_train", "reference"])
def test_an_engine_shares_no_gpu(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0, "CPU": 8.0})
    own = {"actor_train": {"device_mapping": [0]}, "reference": {"device_mapping": [1]}}
    config = RLVRConfig(exp_name="x", pretrain="p", use_kl_loss=True, actor_infer={"device_mapping": [2]}, **own)
    assert placement.resolve_device_kind(config) == "cuda"
    shared = config.model_copy(update={other: getattr(config, other).model_copy(update={"device_mapping": (2, 3)})})
    with pytest.raises(ConfigError, match=rf"an engine cannot share a GPU.*{other} also has devices 2"):
        placement.resolve_device_kind(shared)
    assert placement.resolve_device_kind(shared.model_copy(update={"device_type": "cpu"})) == "cpu"


@pytest.mark.parametrize(("again", "kind"), [(None, ConfigError), ("cpu", LostWorkerError)])
def test_devices_that_are_not_offered_are_a_loss_in_a_new_start(
    monkeypatch: pytest.MonkeyPatch, again: str | None, kind: type[Exception]
) -> None:
    group = MagicMock()
    group.wait.return_value = False
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: group)
    removed: list[object] = []
    monkeypatch.setattr(placement, "remove_placement_group", removed.append)
    with pytest.raises(kind, match="the cluster did not offer"), placement.place(CONFIG, again=again):
        pass
    assert removed == [group]
