"""New weights for the model of an `hf_infer` engine: safetensors over TCP, one connection per call.

A call is one line `KEY VERSION SIZE` and SIZE bytes of safetensors. The answer is one line: empty, or an error. The
first call of an update and the last have no tensors. Until the last one VERSION is `N-incomplete`, and no sample of the
engine is accepted.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from socketserver import StreamRequestHandler, ThreadingTCPServer

import torch
from safetensors.torch import load, save

from roll_r3.config.findings.readable import readable
from roll_r3.errors import EngineError
from roll_r3.weights.buckets import fill_buckets
from roll_r3.weights.channel import as_sent, incomplete
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)

_MAX_LINE = 4096
"""Bytes of a line."""
_SILENCE_S = 30.0
"""Seconds of silence on a connection until the engine closes it."""


class WeightReceiver:
    """Receiving end: writes new weights into a model. `version` is the version of these weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], lock: threading.Lock, host: str) -> None:
        """
        Args:
            tensors: name in a checkpoint -> memory in the model.
            lock: held while anything is written; hold it to compute with the weights.
            host: address to listen on.
        """
        self.version = "0"
        self.key = secrets.token_urlsafe(32)
        self._tensors, self._lock = tensors, lock
        self._missing = set(tensors)
        receiver = self

        class Handler(StreamRequestHandler):
            timeout = _SILENCE_S

            def handle(self) -> None:
                key, _, rest = self.rfile.readline(_MAX_LINE).partition(b" ")
                if not hmac.compare_digest(key, receiver.key.encode()):
                    error = "wrong key"
                else:
                    try:
                        version, size = rest.decode().split()
                        receiver.update(version, self.rfile.read(int(size)))
                        error = ""
                    except Exception as problem:
                        logger.exception("a weight update failed")
                        error = readable(problem)
                self.wfile.write(error.encode() + b"\n")

        self._server = ThreadingTCPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="weight-receiver", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def update(self, version: str, data: bytes) -> None:
        """Write tensors, or begin an update without any, or end one with a plain number as version.

        Raises:
            ValueError: a name or shape unknown to the model, or missing weights; nothing was changed.
            SafetensorError: malformed `data`.
        """
        tensors = load(data) if data else {}
        with self._lock:
            for name, tensor in tensors.items():
                held = self._tensors[name].shape if name in self._tensors else None
                if tensor.shape != held:
                    found = "no such tensor" if held is None else list(held)
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, the model has {found}")
            if version.isdecimal() and (tensors or self._missing):
                names = ", ".join(sorted(self._missing or tensors)[:5])
                raise ValueError(f"{len(self._missing)} of {len(self._tensors)} weights never came: {names} ...")
            self.version = version
            if not tensors:
                self._missing = set(self._tensors)
            for name, tensor in tensors.items():
                self._tensors[name].copy_(tensor)
                self._missing.discard(name)


class HfWeightChannel:
    """Sending end. Implements `roll_r3.strategies.base.WeightChannel`; every method blocks."""

    def __init__(self, targets: Sequence[ServerTarget], *, device: str, timeout_s: float = 600.0) -> None:
        """
        Args:
            device: not used; tensors are sent from the CPU.
            timeout_s: timeout of one call to one engine.
        """
        self._targets = tuple(targets)
        self._timeout_s = timeout_s
        self._version = 0
        self._failure = ""

    def begin(self, version: int) -> None:
        self._version = version
        self._call(incomplete(version))

    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        return fill_buckets(([weight] for weight in weights), size)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        dtype = self._targets[0].dtype
        self._call(incomplete(self._version), save({name: as_sent(name, t, dtype, "cpu") for name, t in bucket}))

    def end(self) -> None:
        self._call(str(self._version))

    def close(self) -> None:
        """Do nothing: no connection outlives a call."""

    def _call(self, version: str, data: bytes = b"") -> None:
        if self._failure:
            raise EngineError(f"an earlier weight update failed, its engines hold unknown weights: {self._failure}")
        for target in self._targets:
            try:
                with socket.create_connection((target.host, target.port), self._timeout_s) as connection:
                    connection.sendall(f"{target.api_key} {version} {len(data)}\n".encode())
                    connection.sendall(data)
                    answer = connection.makefile("rb").readline(_MAX_LINE)
            except OSError as error:
                answer = f"not reachable: {error}".encode()
            if answer != b"\n":
                reason = readable(answer.decode(errors="replace").strip()) or "the connection was closed"
                self._failure = f"{target.name} did not take the weights: {reason}"
                raise EngineError(self._failure)
