"""New weights of an hf_infer engine: complete updates, refusals that change nothing, and the key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from roll_r3.engines.hf import weights as module
from roll_r3.engines.hf.weights import HfWeightChannel, WeightReceiver
from roll_r3.errors import EngineError
from roll_r3.weights.target import ServerTarget


@pytest.fixture
def receiver() -> Iterator[WeightReceiver]:
    tensors = {"w": torch.zeros(2), "m.e_score_correction_bias": torch.zeros(3)}
    receiver = WeightReceiver(tensors, threading.Lock(), "127.0.0.1")
    yield receiver
    receiver.close()


def target(receiver: WeightReceiver) -> ServerTarget:
    return ServerTarget("engine 0", "127.0.0.1", receiver.port, receiver.key, tp_size=1, dtype="bfloat16")


WEIGHTS = {"w": torch.tensor([1 / 3, 2.0]), "m.e_score_correction_bias": torch.tensor([1 / 3, 0.5, 0.0])}


def test_an_update_arrives_in_the_precision_of_the_engine(receiver: WeightReceiver) -> None:
    channel = HfWeightChannel([target(receiver)], device="cpu")
    for version in (3, 4):
        channel.begin(version)
        assert receiver.version == f"{version}-incomplete"
        for bucket in channel.buckets(WEIGHTS.items(), 1):
            channel.send(bucket)
        assert receiver.version == f"{version}-incomplete"
        channel.end()
        assert receiver.version == str(version)
    channel.close()
    assert torch.equal(receiver._tensors["w"], WEIGHTS["w"].bfloat16().float())
    assert torch.equal(receiver._tensors["m.e_score_correction_bias"], WEIGHTS["m.e_score_correction_bias"])


def test_an_incomplete_update_ends_the_use_of_the_channel(receiver: WeightReceiver) -> None:
    channel = HfWeightChannel([target(receiver)], device="cpu")
    channel.begin(3)
    channel.send([("w", WEIGHTS["w"])])
    missing = "engine 0 did not take the weights: ValueError: 1 of 2 weights never came: m.e_score_correction_bias"
    with pytest.raises(EngineError, match=missing):
        channel.end()
    assert receiver.version == "3-incomplete"
    with pytest.raises(
        EngineError, match="an earlier weight update failed, its engines hold unknown weights: engine 0"
    ):
        channel.begin(4)


@pytest.mark.parametrize(
    ("name", "size", "held"), [("x", 2, "the model has no such tensor"), ("w", 3, r"the model has \[2\]")]
)
def test_a_tensor_unknown_to_the_model_is_refused(receiver: WeightReceiver, name: str, size: int, held: str) -> None:
    channel = HfWeightChannel([target(receiver)], device="cpu")
    channel.begin(3)
    with pytest.raises(EngineError, match=rf"{name} has shape \[{size}\], {held}"):
        channel.send([("w", torch.ones(2)), (name, torch.ones(size))] if name != "w" else [(name, torch.ones(size))])
    assert not receiver._tensors["w"].any(), "nothing was written"


def test_the_key_is_required(receiver: WeightReceiver) -> None:
    channel = HfWeightChannel([replace(target(receiver), api_key="wrong")], device="cpu")
    with pytest.raises(EngineError, match="wrong key"):
        channel.begin(3)
    assert receiver.version == "0"


def test_a_dead_engine_is_an_error(receiver: WeightReceiver) -> None:
    receiver.close()
    with pytest.raises(EngineError, match="engine 0 did not take the weights: not reachable"):
        HfWeightChannel([target(receiver)], device="cpu").begin(3)


def call(receiver: WeightReceiver, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"3 0", b"ValueError: 2 of 2 weights never came"),
        (b"3-incomplete 9", b"SafetensorError"),
        (b"3-incomplete many", b"invalid literal"),
        (b"3-incomplete", b"not enough values"),
        (b"", b"not enough values"),
        (b"\xff 1", b"UnicodeDecodeError"),
    ],
)
def test_a_refused_call_changes_nothing(receiver: WeightReceiver, line: bytes, error: bytes) -> None:
    assert error in call(receiver, receiver.key.encode() + b" " + line + b"\n[[[[[[[[[")
    whole = save({"w": torch.ones(2)})
    cut = f"{receiver.key} 3-incomplete {len(whole)}\n".encode() + whole[:-1]
    assert b"SafetensorError" in call(receiver, cut)
    assert receiver.version == "0" and not receiver._tensors["w"].any()


@pytest.mark.parametrize(
    "first", [b"", b"\n", b"wrong 3 0\n", b"x" * 100_000], ids=["nothing", "empty", "wrong", "long"]
)
def test_nothing_is_read_without_the_key(receiver: WeightReceiver, first: bytes) -> None:
    with suppress(OSError):  # the engine may answer and close before everything was sent
        assert call(receiver, first) in (b"wrong key\n", b"")
    assert receiver.version == "0"


def test_a_silent_caller_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_S", 0.2)
    receiver = WeightReceiver({"w": torch.zeros(2)}, threading.Lock(), "127.0.0.1")
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as connection:
        connection.sendall(f"{receiver.key} 3-incomplete 9\n".encode())
        assert b"TimeoutError" in connection.makefile("rb").read()
    receiver.close()
