"""Parts of one kind of server: how it is launched, how a sample is requested, and how its state is read.

`roll_r3.engines.server` composes an engine of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from roll_r3.config.strategies import ServerConfig
from roll_r3.engines.client import ServerClient
from roll_r3.engines.sample import Asked, Sample
from roll_r3.models.facts import ModelFacts


class Program(Protocol):
    """Server program of one engine."""

    @property
    def engine(self) -> str:
        """Name of the engine, for messages."""

    @property
    def package(self) -> str:
        """Required distribution in the interpreter."""

    @property
    def python(self) -> str:
        """Interpreter of the server."""

    @property
    def keyed_path(self) -> str:
        """Path of a cheap GET, answered by the generating part of the server, and only to holders of the key.

        It generates nothing: one more sample in a batch could change the last bits of the others.
        """

    def problems(self, facts: ModelFacts) -> list[str]:
        """Return the reasons why the engine cannot run as configured."""

    def check_version(self, text: str) -> str | None:
        """Return a warning about the installed release, or None.

        Raises:
            EngineError: a release outside the supported window.
        """

    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        """Return the server's command line, without the key: every user of the machine can read a command line."""

    def environment(self, key: str) -> Mapping[str, str]:
        """Return the server's environment, the key included."""


class Codec(Protocol):
    """Form of a request for one sample, and of its answer."""

    @property
    def path(self) -> str:
        """Path to POST a request to."""

    def load(self) -> None:
        """Read the needed parts of the checkpoint. Called once before the first request, in a thread."""

    def request(self, asked: Asked) -> dict[str, Any]:
        """Return the JSON body of a request. All sampling settings come from `asked.sample.sampling`."""

    def kept_limit(self, asked: Asked) -> int:
        """Return top_k of the sets of kept tokens in the answer; 0 if it has none."""

    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        """Read and check an answer. Called in a thread.

        Raises:
            SampleError: an unusable answer, or one not in the form documented by the engine.
            RouteError: log-probabilities or routes break their contract.
        """


class Status(Protocol):
    """State of a running server. Every method raises SampleError if the server does not tell."""

    async def prepare(self, client: ServerClient) -> None:
        """Complete the start of an answering server."""

    async def why_closed(self, client: ServerClient, weight_version: int) -> str:
        """Return why the engine would not answer requests now; empty if it would."""

    async def recomputed(self, client: ServerClient) -> int:
        """Return the number of times the engine discarded and recomputed a sample so far, if its answers hide it."""

    async def abort(self, client: ServerClient, request_id: str) -> None:
        """End a request of this id, whose connection is closed by now; nothing if there is none."""

    async def cache_page(self, client: ServerClient) -> int:
        """Return the tokens per page of the prefix cache; it keeps whole pages only. 0: no cache."""


@dataclass(frozen=True)
class Parts:
    """All parts of one kind of server."""

    program: Program
    codec: Codec
    status: Status
    settings: ServerConfig
