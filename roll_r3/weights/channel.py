"""New weights from one training rank to every engine, broadcast tensor by tensor, without files.

This runs in the trainer. An update is a few HTTP calls to each server, and broadcasts in a torch.distributed group. The
trainer is rank 0; the engines' tensor-parallel ranks follow in the order of the targets. The names of the calls are in
the folder of each engine.

An engine must never sample from half-written weights unnoticed. So `begin` marks the servers' weight version as
incomplete before the first tensor, and only `end` writes the new number. Rollouts refuse answers with the mark. After a
failure the mark stays, and the channel refuses further use.
"""

from __future__ import annotations

import http.client
import json
import logging
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from roll_r3.config.findings.readable import readable
from roll_r3.errors import EngineError
from roll_r3.weights.group import from_the_trainer, join_group, leave_group, set_timeout
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)

_LEAVE_S = 20.0
"""Seconds for engines to leave a group."""
_LONGEST_ANSWER = 1 << 20
"""Bytes read of an engine's answer, with its success or its error."""
_SHOWN = 1000
"""Characters of an answer in a message."""
_KEPT_IN_FP32 = ("e_score_correction_bias",)
"""Endings of the names of tensors kept in fp32 by every engine. The others are sent in the engine's precision."""


@dataclass(frozen=True)
class Meeting:
    """Meeting point of an engine's ranks."""

    address: str
    port: int
    rank_offset: int
    """Rank of the engine's first device."""
    world_size: int
    group_name: str
    backend: str
    """"gloo" or "nccl"."""


@dataclass(frozen=True)
class Tensors:
    """Tensors of one request, in the order of its broadcasts."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class ServerWeightChannel(ABC):
    """Sending end. Implements `roll_r3.strategies.base.WeightChannel`; every method blocks.

    Do not use it from several threads at once. The first `begin` joins the group.
    """

    def __init__(
        self,
        targets: Sequence[ServerTarget],
        *,
        device: str,
        timeout_s: float = 600.0,
        join_timeout_s: float = 120.0,
    ) -> None:
        """
        Args:
            targets: one per engine.
            device: "cpu" (gloo) or "cuda" (NCCL); the current device is used.
            timeout_s: timeout of one call (one bucket) on every engine.
            join_timeout_s: timeout of joining the group.
        """
        self._targets = tuple(targets)
        self._device = device
        self._backend = "nccl" if device == "cuda" else "gloo"
        self._timeout_s = timeout_s
        self._join_timeout_s = join_timeout_s
        self._group_name = f"roll_r3_weights_{secrets.token_hex(6)}"
        self._group: dist.ProcessGroup | None = None
        self._version: int | None = None
        self._failure: str | None = None

    def begin(self, version: int) -> None:
        """Open an update to weight version `version`.

        Raises:
            EngineError: an engine refused or is gone, or an earlier update failed.
        """
        self._check_usable()
        assert self._version is None, "an update is open already"
        if self._group is None:
            self._join()
        self._version = version
        self._on_every_engine(lambda target: self._open(target, incomplete(version)))

    @abstractmethod
    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Group weights for `send`, about `size` bytes each; tensors needed together share a bucket."""

    @abstractmethod
    def _enter(self, target: ServerTarget, meeting: Meeting) -> None:
        """Have an engine's ranks join the group, and wait for them."""

    @abstractmethod
    def _open(self, target: ServerTarget, version: str) -> None:
        """Have an engine expect tensors, and mark its samples with `version` from now on."""

    @abstractmethod
    def _take(self, target: ServerTarget, tensors: Tensors, version: str) -> None:
        """Have an engine receive tensors, and wait until they are in the model."""

    @abstractmethod
    def _close(self, target: ServerTarget, version: str) -> None:
        """Have an engine sample from the received weights with empty caches, as `version`."""

    @abstractmethod
    def _leave(self, target: ServerTarget) -> None:
        """Have an engine's ranks leave the group."""

    def _succeeded(self, answer: str) -> bool:
        """Return True if an answer with status 200 is a success. Subclasses override it if their engine may differ."""
        return True

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Send (Hugging Face name, whole tensor) pairs.

        Raises:
            EngineError: an engine failed and must not be used again.
        """
        self._check_usable()
        assert self._group is not None, "begin() comes first"
        assert self._version is not None, "begin() comes first"
        # Engines of one role share a configuration, hence a precision.
        dtype = self._targets[0].dtype
        tensors = [(name, as_sent(name, tensor, dtype, self._device)) for name, tensor in bucket]
        sent = Tensors(
            names=[name for name, _ in tensors],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            shapes=[list(tensor.shape) for _, tensor in tensors],
        )
        version = incomplete(self._version)
        group = self._group
        works: list[Any] = []

        def broadcast() -> None:
            works.extend(group.broadcast([tensor], from_the_trainer()) for _, tensor in tensors)

        self._on_every_engine(lambda target: self._take(target, sent, version), meanwhile=broadcast)
        for work in works:
            work.wait()  # returns at once: every engine has answered

    def end(self) -> None:
        """Close the update: new version, caches flushed, each checked on every engine.

        Raises:
            EngineError: an engine refused or is gone.
        """
        self._check_usable()
        assert self._version is not None, "begin() comes first"
        version = self._version
        self._on_every_engine(lambda target: self._close(target, str(version)))
        self._version = None

    def close(self) -> None:
        """Leave the group. Engines may be gone already, and none is waited for long."""
        if self._group is None:
            return
        self._timeout_s = min(self._timeout_s, _LEAVE_S)
        leaving = {target.name: _in_thread(partial(self._leave, target)) for target in self._targets}
        wait(leaving.values(), timeout=_LEAVE_S)
        for name, future in leaving.items():
            if not future.done() or future.exception() is not None:
                logger.info("%s did not leave the weight group: %s", name, future.exception() if future.done() else "")
        self._abandon_group()

    def _join(self) -> None:
        """Listen as rank 0, send the address to each engine, and wait until all have joined."""
        host = _address_towards(self._targets[0])
        timeout = timedelta(seconds=self._join_timeout_s)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound to one address here: the store itself would listen on all of them. It takes over the socket.
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        world_size = 1 + sum(target.tp_size for target in self._targets)
        store = TCPStore(host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
        offsets = {}
        offset = 1
        for target in self._targets:
            offsets[target] = offset
            offset += target.tp_size

        def enter(target: ServerTarget) -> None:
            meeting = Meeting(host, port, offsets[target], world_size, self._group_name, self._backend)
            self._enter(target, meeting)

        joined = _in_thread(
            lambda: join_group(
                store,
                self._group_name,
                rank=0,
                world_size=world_size,
                backend=self._backend,
                timeout_s=self._join_timeout_s,
            )
        )
        try:
            self._on_every_engine(enter, also=joined)
        except EngineError:
            joined.add_done_callback(_leave_if_joined)  # it may still succeed
            raise
        self._group = joined.result()
        set_timeout(self._group, self._timeout_s)
        logger.info("weight group of %d ranks with %s", world_size, ", ".join(target.name for target in self._targets))

    def _on_every_engine(
        self,
        call: Callable[[ServerTarget], None],
        *,
        meanwhile: Callable[[], None] | None = None,
        also: Future[Any] | None = None,
    ) -> None:
        """Call all engines at once, and wait for all or for the first failure.

        Args:
            meanwhile: this rank's part, run after the calls were sent; must not block.
            also: another required future.
        """
        calls = [_in_thread(partial(call, target)) for target in self._targets]
        futures = [*calls, also] if also is not None else calls
        try:
            if meanwhile is not None:
                meanwhile()
            done, pending = wait(futures, timeout=self._timeout_s + 10.0, return_when=FIRST_EXCEPTION)
            # An engine's own message says more than a broken connection of the group.
            for future in sorted(done, key=lambda future: future is also):
                future.result()
            if pending:
                raise EngineError(f"{len(pending)} of {len(futures)} calls of a weight update did not return")
        except Exception as error:
            self._failure = str(error)
            self._abandon_group()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the weight update failed in the group: {error}") from error

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise EngineError(f"an earlier weight update failed, its engines hold unknown weights: {self._failure}")

    def _abandon_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            leave_group(group)

    def _post(
        self,
        target: ServerTarget,
        path: str,
        request: dict[str, Any],
        *,
        timeout_s: float | None = None,
        may_be_missing: bool = False,
    ) -> None:
        """Make one call and check its answer.

        Args:
            may_be_missing: True if an engine without the endpoint does not need the call.
        """
        connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout_s or self._timeout_s)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {target.api_key}"}
        try:
            connection.request("POST", path, json.dumps(request), headers)
            response = connection.getresponse()
            text = response.read(_LONGEST_ANSWER).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            what = "did not answer" if isinstance(error, TimeoutError) else "is not reachable"
            raise EngineError(f"{target.name} {what} at {path}: {readable(error)}") from error
        finally:
            connection.close()
        if response.status == 404 and may_be_missing:
            return
        if response.status != 200 or not self._succeeded(text):
            raise EngineError(f"{target.name} refused {path} ({response.status}): {readable(text, _SHOWN)}")


def as_sent(name: str, tensor: torch.Tensor, dtype: str, device: str) -> torch.Tensor:
    """Return a weight in the precision and on the device for sending."""
    tensor = tensor.detach()
    if tensor.is_floating_point() and not name.endswith(_KEPT_IN_FP32):
        tensor = tensor.to(getattr(torch, dtype))
    return tensor.to(device).contiguous()


def incomplete(version: int) -> str:
    """Return the weight version of an engine during an update; rollouts refuse it."""
    return f"{version}-incomplete"


def _leave_if_joined(joined: Future[dist.ProcessGroup]) -> None:
    if joined.exception() is None:
        leave_group(joined.result())


def _address_towards(target: ServerTarget) -> str:
    """Return this machine's address on the route to an engine; loopback for a loopback engine."""
    try:
        with socket.create_connection((target.host, target.port), timeout=5.0) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"{target.name} is not reachable at {target.host}:{target.port}: {error}") from error


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run in a daemon thread: unlike a pool's thread, it cannot keep the process alive while a peer hangs."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001  passed to the waiting thread
            future.set_exception(error)

    threading.Thread(target=run, name="weight-update", daemon=True).start()
    return future
