"""Hostile calls to the receiver of weights, over real connections: refused and without effect, or valid."""

from __future__ import annotations

import logging
import socket
import threading
from typing import Any

import torch
from fuzz_harness import Verdict, Wrong, mutated
from hypothesis import strategies as st
from safetensors.torch import load, save

from roll_r3.engines.hf import weights
from roll_r3.engines.hf.weights import WeightReceiver

SHAPES = {"a": [2, 3], "b": [4]}
ANSWER = 1 << 16
"""Bytes of the longest answer."""
_WHOLE = save({name: torch.ones(shape) for name, shape in SHAPES.items()})
_SIZES = ["0", "-1", "1e3", "", "9" * 12, str(1 << 40), "0x10", "+5", "5 5"]
_VERSIONS = ["3-incomplete"] * 4 + ["3", "", "\u0663", "-3", "3" * 5000]


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    data = draw(st.sampled_from([_WHOLE, b"", save({"a": torch.ones(7)})]))
    if draw(st.booleans()):
        data = draw(mutated(data))
    return {
        "key": draw(st.sampled_from(["right"] * 6 + ["wrong", "none", "bytes", "long"])),
        "version": draw(st.sampled_from(_VERSIONS)),
        "size": draw(st.just(str(len(data))) | st.sampled_from(_SIZES)),
        "data": data,
    }


class Receiver:
    name = "receiver"

    def __init__(self) -> None:
        logging.getLogger(weights.__name__).setLevel(logging.CRITICAL)  # it logs each refusal with its stack
        self._tensors = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
        self._receiver = WeightReceiver(self._tensors, threading.Lock(), "127.0.0.1")

    def inputs(self) -> st.SearchStrategy[Any]:
        return _calls()

    def judge(self, value: dict[str, Any]) -> Verdict:
        self._receiver.version = "2"
        self._receiver._missing = set()
        for tensor in self._tensors.values():
            tensor.fill_(7.0)
        answer = self._call(value)
        if answer == b"\n":
            self._check_taken(value)
            return "taken"
        if self._receiver.version != "2" or any(not tensor.eq(7.0).all() for tensor in self._tensors.values()):
            raise Wrong(f"refused by {answer[:100]!r}, and something was written")
        if b"Traceback" in answer:
            raise Wrong("a stack was answered")
        return "refused"

    def _check_taken(self, value: dict[str, Any]) -> None:
        """Raise Wrong unless the model has the tensors of the call."""
        if value["key"] != "right":
            raise Wrong("a caller without the key was let in")
        version, size = f"{value['version']} {value['size']}".split()
        data = value["data"] if int(size) < 0 else value["data"][: int(size)]
        sent = load(data) if data else {}
        if self._receiver.version != version or (sent and version.isdecimal()):
            raise Wrong(f"the version is {self._receiver.version!r}")
        for name, tensor in self._tensors.items():
            expected = sent.get(name, torch.full(SHAPES[name], 7.0)).to(torch.float32)
            if not torch.equal(tensor.nan_to_num(), expected.nan_to_num()):
                raise Wrong(f"{name} is not what was sent")

    def _call(self, value: dict[str, Any]) -> bytes:
        """Return the answer; empty if the connection was closed instead."""
        key = self._receiver.key.encode()
        given = {"right": key, "wrong": key + b"x", "none": b"", "bytes": b"\xff\xfe", "long": b"x" * 50_000}
        head = given[value["key"]] + f" {value['version']} {value['size']}\n".encode()
        with socket.create_connection(("127.0.0.1", self._receiver.port), timeout=10) as connection:
            answer = b""
            try:
                connection.sendall(head + value["data"])
                connection.shutdown(socket.SHUT_WR)
                while (piece := connection.recv(1 << 16)) and len(answer) <= ANSWER:
                    answer += piece
            except OSError:
                pass  # it answered and closed before everything was sent
        if len(answer) > ANSWER:
            raise Wrong("an answer without end")
        return answer

    def close(self) -> None:
        self._receiver.close()
