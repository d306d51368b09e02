"""Hostile requests to the receiver of weights, over real connections.

The model must stay unchanged, or follow a request that keeps to the contract.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
from fuzz_harness import HOSTILE, Verdict, Wrong, mutated, replanted
from hypothesis import strategies as st
from torch.distributed import TCPStore

from roll_r3.engines.hf import receiver
from roll_r3.engines.hf.receiver import MAX_BODY, WeightReceiver

SHAPES = {"a": [2, 3], "b": [4]}
DTYPES = ("float32", "bfloat16", "float16", "float64")
ANSWER = 1 << 16
"""Bytes of the longest answer."""
_JOIN: dict[str, Any] = {"master_address": "127.0.0.1", "rank_offset": 0, "world_size": 1, "backend": "gloo"}
_UPDATE = {
    "names": list(SHAPES), "dtypes": ["float32"] * 2, "shapes": list(SHAPES.values()), "weight_version": "3-incomplete",
    "group_name": "g", "flush_cache": False,
}  # fmt: skip
_END = {"names": [], "dtypes": [], "shapes": [], "weight_version": "3"}
_PATHS = ["/update_weights_from_distributed"] * 4 + ["/begin_weight_update", "/end_weight_update", "/flush_cache", "/x"]


@st.composite
def _requests(draw: st.DrawFn) -> dict[str, Any]:
    update = draw(st.sampled_from([_UPDATE, _END]))
    kind = draw(st.sampled_from(["as it is", "replanted", "replanted", "bytes", "hostile", "deep", "twice"]))
    value: Any = update
    if kind == "replanted":
        value = draw(replanted(update))
    elif kind == "hostile":
        value = draw(HOSTILE)
    elif kind == "twice":
        value = {**update, "names": ["a"] * 5000, "shapes": [SHAPES["a"]] * 5000, "dtypes": ["float64"] * 5000}
    body = json.dumps(value, default=lambda _: None).encode()
    if kind == "bytes":
        body = draw(mutated(body))
    if kind == "deep":
        body = b"[" * draw(st.sampled_from([900, 100_000]))
    length = draw(
        st.just(str(len(body)))
        | st.sampled_from(["0", "-1", "1e3", "", "9" * 30, str(MAX_BODY + 1), str(1 << 62), "0x10", "+5", " 7", "7,7"])
    )
    key = draw(st.sampled_from(["right"] * 6 + ["wrong", "none", "empty", "other", "bytes", "long"]))
    return {"path": draw(st.sampled_from(_PATHS)), "key": key, "length": length, "body": body}


class Receiver:
    name = "receiver"

    def __init__(self) -> None:
        logging.getLogger(receiver.__name__).setLevel(logging.CRITICAL)  # each refusal is logged with its stack
        self._tensors = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
        self._receiver = WeightReceiver(self._tensors, threading.Lock(), "127.0.0.1")
        # a group of one broadcasts the memory's own content to itself
        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
        join = _JOIN | {"master_port": self._store.port, "group_name": "g"}
        assert self._receiver.answer("/init_weights_update_group", join)[0] == 200

    def inputs(self) -> st.SearchStrategy[Any]:
        return _requests()

    def judge(self, value: dict[str, Any]) -> Verdict:
        self._receiver.version = "2"
        for tensor in self._tensors.values():
            tensor.fill_(7.0)
        self._receiver._missing = set() if value["path"] != "/x" else set(SHAPES)
        status, answer = self._call(value)
        taken = status == 200
        if taken and value["key"] != "right":
            raise Wrong("a caller without the key was let in")
        if taken and not self._is_right(value):
            raise Wrong("taken, and is not right")
        expected = "2"
        if taken and value["path"].startswith("/update"):
            expected = json.loads(value["body"][: int(value["length"])])["weight_version"]
        if self._receiver.version != expected:
            raise Wrong(f"the version is {self._receiver.version!r}, after {status}")
        if not taken:
            if any(not tensor.eq(7.0).all() for tensor in self._tensors.values()):
                raise Wrong("refused, and weights were written")
            if b"Traceback" in answer:
                raise Wrong("a stack was answered")
        return "taken" if taken else "refused"

    def _is_right(self, value: dict[str, Any]) -> bool:
        request = json.loads(value["body"][: int(value["length"])] or b"{}")
        if value["path"] != "/update_weights_from_distributed":
            return isinstance(request, dict) and value["path"] != "/x"
        names, version = request["names"], request["weight_version"]
        return (
            isinstance(version, str)
            and not (version.isdecimal() and names)
            and len(names) == len(set(names)) == len(request["dtypes"]) == len(request["shapes"])
            and all(dtype in DTYPES for dtype in request["dtypes"])
            and json.dumps(request["shapes"]) == json.dumps([SHAPES[name] for name in names])
        )

    def _call(self, value: dict[str, Any]) -> tuple[int, bytes]:
        """Return (status, answer); 0: the connection was closed instead."""
        key = self._receiver.key
        given = {"right": f"Bearer {key}", "wrong": f"Bearer {key}x", "none": None, "empty": "", "other": key,
                 "bytes": "Bearer \xff\xfe", "long": "Bearer " + "x" * 50_000}[value["key"]]  # fmt: skip
        head = f"POST {value['path']} HTTP/1.1\r\nContent-Length: {value['length']}\r\n"
        head += "" if given is None else f"Authorization: {given}\r\n"
        with socket.create_connection(("127.0.0.1", self._receiver.port), timeout=10) as connection:
            answer = b""
            try:
                connection.sendall(head.encode("latin-1") + b"\r\n" + value["body"])
                connection.shutdown(socket.SHUT_WR)
                while (piece := connection.recv(1 << 16)) and len(answer) <= ANSWER:
                    answer += piece
            except OSError:
                pass  # the server answered and closed before everything was sent
        if len(answer) > ANSWER:
            raise Wrong("an answer without end")
        return (int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0), answer

    def close(self) -> None:
        self._receiver.close()
        for thread in threading.enumerate():
            if thread.name == "weight-group":  # shuts down the group
                thread.join(20)
        del self._store
