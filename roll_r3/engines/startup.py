"""Start of one server: release check, launch on a free port, warm-up, and a test of its prefix cache."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from roll_r3.config.engine_role import EngineRole
from roll_r3.engines.client import ServerClient
from roll_r3.engines.health import Health
from roll_r3.engines.parts import Parts
from roll_r3.engines.process import ServerProcess, free_port, signal_group
from roll_r3.engines.sample import SampleError, SampleRequest
from roll_r3.engines.sampler import Sampler
from roll_r3.engines.sharing import LEAST_ROWS
from roll_r3.errors import EngineError, RouteError
from roll_r3.models.facts import ModelFacts

logger = logging.getLogger(__name__)

LAUNCHES = 3
"""Number of launches, if another process takes the port first each time."""
_PROMPT = (0, 1, 2, 3)
_TOKENS = 2


class Startup:
    """One start of a server."""

    def __init__(
        self, parts: Parts, process: ServerProcess, key: str, name: str, *, closed: Callable[[], bool]
    ) -> None:
        """
        Args:
            name: of the engine, for messages.
            closed: returns True once the engine was stopped for good; no server is launched afterwards.
        """
        self._program, self._settings = parts.program, parts.settings
        self._process = process
        self._key = key
        self._name = name
        self._closed = closed
        self._environment: Mapping[str, str] = self._program.environment(key)

    async def launch(self, checkpoint: Path, facts: ModelFacts, deadline: float) -> ServerClient:
        """Check the release, then launch the server and wait until it answers.

        Args:
            deadline: on the event loop's clock.

        Raises:
            EngineError: no interpreter, none that answers in time, a release outside the window, a server that exits,
                or an engine stopped for good.
            TimeoutError: the server did not answer in time.
        """
        version = await self._installed_version(deadline)
        if warning := self._program.check_version(version):
            logger.warning("%s: %s", self._name, warning)
        logger.info(
            "%s: starting %s %s, its log is %s", self._name, self._program.engine, version, self._process.log_path
        )
        async with asyncio.timeout_at(deadline):
            return await self._answering_server(str(checkpoint), facts)

    async def _installed_version(self, deadline: float) -> str:
        """Return the release in the server's interpreter, perhaps another one than this."""
        python, package = self._program.python, self._program.package
        code = f"from importlib.metadata import version; print(version({package!r}))"
        try:
            process = await asyncio.create_subprocess_exec(
                python,
                "-c",
                code,
                env=self._environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"{self._name}: cannot run strategy_config.python {python!r}: {error}") from error
        try:
            async with asyncio.timeout_at(deadline):
                output, errors = await process.communicate()
        except BaseException as error:
            signal_group(process.pid, signal.SIGKILL)  # a wrapper script has the interpreter as a child
            await process.wait()
            if not isinstance(error, TimeoutError):
                raise
            raise EngineError(
                f"{self._name}: strategy_config.python {python!r} did not report its {self._program.engine} release "
                f"within {self._settings.startup_timeout:g} s (strategy_config.startup_timeout)"
            ) from error
        if process.returncode:
            last_line = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise EngineError(
                f"{self._name}: {python} has no {self._program.engine} ({last_line}); "
                "install it there, or point strategy_config.python at an interpreter that has it"
            )
        return output.decode().strip()

    async def _answering_server(self, checkpoint: str, facts: ModelFacts) -> ServerClient:
        """Launch the server, again on another port if the first was taken, and wait until it is healthy."""
        host = self._settings.host
        for attempt in range(1, LAUNCHES + 1):
            if self._closed():
                raise EngineError(f"{self._name} is not started: it was stopped for good meanwhile")
            port = free_port(host)
            self._process.launch(self._program.command(checkpoint, facts, port), self._environment)
            client = ServerClient(host, port, self._key, keyed_path=self._program.keyed_path)
            try:
                while self._process.running:
                    if await client.healthy(timeout_s=30.0):
                        return client
                    await asyncio.sleep(0.2)
            except BaseException:
                await client.close()
                raise
            await client.close()
            if attempt == LAUNCHES or "address already in use" not in self._process.log_tail(200).lower():
                raise EngineError(f"{self._name} did not start: {self._process.obituary()}")
            logger.warning("%s: port %d was taken, trying another", self._name, port)
            await self._process.stop(grace_s=0.0)  # its children may not have noticed yet
        raise AssertionError("the last attempt returned or raised")


class WarmUp:
    """First requests to a new server."""

    def __init__(self, parts: Parts, client: ServerClient, sampler: Sampler, health: Health, name: str) -> None:
        self._parts = parts
        self._client = client
        self._sampler = sampler
        self._health = health
        self._name = name

    async def run(self, role: EngineRole, seed: int) -> None:
        """Sample once, checked, and find out whether prompts can be shared.

        The first generation fills a compile cache and can take half a minute. It also proves the route contract.

        Raises:
            EngineError: the server died, or its answer is not usable.
        """
        sampling = replace(role.sampling, max_new_tokens=_TOKENS)
        wanted = SampleRequest(_PROMPT, "warm-up", seed, sampling, record_routes=role.record_routes)
        try:
            await self._health.until_exit(self._parts.status.prepare(self._client))
            await asyncio.to_thread(self._parts.codec.load)
            await self._sampler.ask(wanted)
            if role.record_routes and role.prompt_length > LEAST_ROWS:
                await self._probe_prefix_cache(wanted, role.prompt_length)
        except (SampleError, RouteError) as error:
            raise EngineError(f"{self._name}: its first answer is not usable: {error}") from error

    async def _probe_prefix_cache(self, wanted: SampleRequest, longest_prompt: int) -> None:
        """Share prompts only if the engine keeps them, and keeps different keys apart.

        No failure matters: every sample can fetch all of its rows.
        """
        try:
            why_not = await self._health.until_exit(self._why_not_shared(wanted, longest_prompt))
        except (SampleError, RouteError) as error:
            why_not = str(error)
        if why_not:
            self._sampler.sharing.engine_keeps(0)
            logger.warning("%s: every sample fetches its prompt's routes itself: %s", self._name, why_not)

    async def _why_not_shared(self, wanted: SampleRequest, longest_prompt: int) -> str:
        """Try it with the shortest prompt worth sharing. Return empty if prompts are shared or all are shorter."""
        page = await self._parts.status.cache_page(self._client)
        await self._sampler.recomputed()
        if not page:
            return "its prefix cache is off"
        rows = -(-LEAST_ROWS // page) * page
        if rows >= longest_prompt:
            return ""
        probe = replace(
            wanted,
            prompt_ids=(_PROMPT * rows)[: rows + 1],
            sampling=replace(wanted.sampling, max_new_tokens=1),
            first_row=rows,
            cached_rows=rows,
            cache_key="warm-up",
        )
        await self._sampler.prime(probe)
        if not (await self._sampler.ask(probe)).from_cache:
            return f"it keeps no prompt of {rows + 1} tokens from one request to the next"
        if (await self._sampler.ask(replace(probe, cache_key="another"))).from_cache:
            return "it finds a prompt under another key than the one it was stored under"
        self._sampler.sharing.engine_keeps(page)
        return ""
