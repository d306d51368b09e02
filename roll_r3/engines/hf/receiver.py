"""The receiving end of a weight update: a small HTTP server that answers the update calls of an SGLang server.

So the trainer has one way to send weights (`roll_r3.engines.sglang.weights`), whatever the engine is. A call
says what comes; the tensors come over the group that the first call joined.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch.distributed import TCPStore

from roll_r3.weights.group import from_the_trainer, join_group, leave_group

logger = logging.getLogger(__name__)

Answer = dict[str, Any]
JOIN_TIMEOUT, BROADCAST_TIMEOUT = 120.0, 600.0
REQUEST_TIMEOUT = 30.0
"""Seconds of silence on a connection while a request is read."""
MAX_BODY = 16 << 20
"""Bytes of a request: the names, dtypes and shapes of one bucket of weights take less."""


class _Update(BaseModel):
    """What comes in one bucket: nothing for a version that is whole, else tensors for one that is not."""

    model_config = ConfigDict(strict=True)

    names: list[str]
    dtypes: list[Literal["float32", "bfloat16", "float16", "float64"]]
    shapes: list[list[int]]
    weight_version: str


class WeightReceiver:
    """Writes new weights into a model. `version` is what SGLang calls the weight version: text, `N-incomplete` between
    the first tensor of an update and its end."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], lock: threading.Lock, host: str) -> None:
        """
        Args:
            tensors: name in a checkpoint -> where it is held.
            lock: held while anything is written; whoever computes with the weights holds it too.
            host: address to listen on.
        """
        self.version = "0"
        self.key = secrets.token_urlsafe(32)
        self._tensors, self._lock = tensors, lock
        self._missing = set(tensors)
        self._group: dist.ProcessGroup | None = None
        self._calls: dict[str, Callable[[Answer], None]] = {
            "/init_weights_update_group": self._join,
            "/begin_weight_update": self._begin,
            "/update_weights_from_distributed": self._update,
            "/end_weight_update": self._nothing,
            "/flush_cache": self._nothing,  # a cache lives no longer than its batch
            "/destroy_weights_update_group": self._leave,
        }
        self._server = ThreadingHTTPServer((host, 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="weight-receiver", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening and cut the group."""
        self._server.shutdown()
        self._server.server_close()
        self._leave({})

    def admits(self, authorization: str) -> bool:
        """Whether a caller has the key."""
        return hmac.compare_digest(authorization.encode(), f"Bearer {self.key}".encode())

    def answer(self, path: str, request: Answer) -> tuple[int, Answer]:
        """(HTTP status, answer) of one call by a caller that is admitted."""
        if path not in self._calls:
            return _refused(404, "no such call")
        try:
            with self._lock:
                self._calls[path](request)
        except Exception as error:
            # whatever it is, the trainer is told: without an answer it would know only of a connection that broke
            logger.exception("%s failed", path)
            return _refused(400, f"{type(error).__name__}: {error}")
        return 200, {"success": True}

    def _nothing(self, request: Answer) -> None:
        pass

    def _begin(self, request: Answer) -> None:
        self._missing = set(self._tensors)

    def _join(self, request: Answer) -> None:
        host, port, world_size = request["master_address"], request["master_port"], request["world_size"]
        store = TCPStore(host, port, world_size, False, timedelta(seconds=JOIN_TIMEOUT))
        self._group = join_group(
            store,
            request["group_name"],
            rank=request["rank_offset"],
            world_size=world_size,
            backend=request["backend"],
            timeout_s=BROADCAST_TIMEOUT,
        )

    def _leave(self, request: Answer) -> None:
        group, self._group = self._group, None
        if group is not None:
            leave_group(group)

    def _update(self, request: Answer) -> None:
        """Receive the tensors that are named, in their order; then the version is the one given.

        Raises:
            ValueError: no group was joined, a name or a shape that the model has not, or the version would be a whole
                one too early.
        """
        if self._group is None:
            raise ValueError("no group was joined: /init_weights_update_group comes first")
        device = next(iter(self._tensors.values())).device
        update = _Update.model_validate(request)
        self._check(update)
        self.version = update.weight_version
        received = [
            (name, torch.empty(self._tensors[name].shape, dtype=getattr(torch, dtype), device=device))
            for name, dtype in zip(update.names, update.dtypes, strict=True)
        ]
        for work in [self._group.broadcast([tensor], from_the_trainer()) for _, tensor in received]:
            work.wait()
        for name, tensor in received:
            self._tensors[name].copy_(tensor)
            self._missing.discard(name)

    def _check(self, update: _Update) -> None:
        """Before anything is allocated, or the version changes."""
        if not len(set(update.names)) == len(update.names) == len(update.dtypes) == len(update.shapes):
            raise ValueError("names, dtypes and shapes are not as many as each other, or a name is there twice")
        for name, shape in zip(update.names, update.shapes, strict=True):
            if name not in self._tensors or list(self._tensors[name].shape) != shape:
                held = list(self._tensors[name].shape) if name in self._tensors else "no such tensor"
                raise ValueError(f"{name} has shape {shape}, the model has {held}")
        if update.weight_version.isdecimal() and (update.names or self._missing):
            names = sorted(self._missing) or update.names
            raise ValueError(f"{len(names)} of {len(self._tensors)} weights never came: {', '.join(names[:5])} ...")


def _refused(status: int, message: str) -> tuple[int, Answer]:
    return status, {"success": False, "message": message}


def _handler(receiver: WeightReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT

        def do_POST(self) -> None:
            status, answer = self._answered()
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _answered(self) -> tuple[int, Answer]:
            """(HTTP status, answer); of a caller without the key nothing is read but the headers."""
            if not receiver.admits(self.headers.get("Authorization", "")):
                return _refused(401, "wrong key")
            length = self.headers.get("Content-Length", "0")
            if not (length.isascii() and length.isdecimal()):
                return _refused(400, f"Content-Length is {length!r}, which is no number of bytes")
            if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
                return _refused(413, f"a request of {length} bytes; {MAX_BODY} are the most")
            try:
                request = json.loads(self.rfile.read(int(length)) or "{}")
            except (ValueError, RecursionError) as error:
                return _refused(400, f"the request is no JSON: {error}")
            if not isinstance(request, dict):
                return _refused(400, "the request is no JSON object")
            return receiver.answer(self.path, request)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the calls are logged by whoever makes them."""

    return Handler
