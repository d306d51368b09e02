"""Ray's start and the devices of a run, without a cluster: what is asked of Ray is answered here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from ray._private import utils

from roll_r3.cluster import placement
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError, LostWorkerError

CONFIG = RLVRConfig(exp_name="x", pretrain="p", max_steps=1, actor_train={}, actor_infer={})


class ToldError(BaseException):
    """Raised by the run's own handler."""


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def told(*_: object) -> None:
        raise ToldError

    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(placement, "_close_to_others", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGTERM, told)
    yield told
    signal.signal(signal.SIGTERM, before)


def take_sigterm() -> None:
    """As `ray.init` does."""
    utils.set_sigterm_handler(lambda signum, frame: None)


def test_sigterm_is_the_runs_own_after_ray_did_not_start(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("no daemon")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(LostWorkerError, match="no daemon"), placement.ray_cluster(CONFIG):
        pass
    assert signal.getsignal(signal.SIGTERM) is handler
    before = utils.set_sigterm_handler
    assert before.__name__ == "set_sigterm_handler", "Ray's own is back"


def test_sigterm_while_ray_starts_is_the_runs_own(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        take_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the handler raises")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ToldError), placement.ray_cluster(CONFIG):
        pass


def test_no_call_starts_another_ray(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does by itself in a thread that is late, or in what a library does at the end."""
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(placement, "_check_is_closed", lambda address: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    with placement.ray_cluster(CONFIG):
        pass
    with pytest.raises(Exception, match="Ray has not been started yet"):
        ray.put(1)
    assert len(started) == 1


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
