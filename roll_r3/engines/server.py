"""One server as a rollout engine: started, watched, asked for samples, restarted and stopped.

`startup` brings it up, `sampling` has the way of a sample, `health` decides whether it is down.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from roll_r3.config.engine_role import EngineRole
from roll_r3.engines.burst import Burst
from roll_r3.engines.client import ServerClient
from roll_r3.engines.health import Health
from roll_r3.engines.parts import Parts
from roll_r3.engines.process import GRACE_S, ServerProcess
from roll_r3.engines.sample import SampleError
from roll_r3.engines.sampler import Sampler
from roll_r3.engines.server_args import CPU_SAMPLES, EVERY_ADDRESS
from roll_r3.engines.startup import Startup, WarmUp
from roll_r3.errors import ConfigError, EngineError
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.strategies.base import EnginePlace, GenerateRequest, GenerateResult
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)


class ServerRollout:
    """One engine, composed of the parts of its kind. Implements `roll_r3.strategies.base.RolloutStrategy`.

    Weight versions: the server starts at 0. A weight channel raises the server's version; after its `end()`,
    `on_weights_updated` must be called with the same number. Until both agree every answer is refused, so samples from
    old or half-written weights cannot pass.

    A dead, silent or useless server is down: it gets no requests until `restart`.
    """

    def __init__(self, role: EngineRole, place: EnginePlace, parts: Parts) -> None:
        self._role = role
        self._place = place
        self._parts = parts
        self._settings = parts.settings
        self._name = f"engine {place.engine_index} ({parts.program.engine})"
        self._client: ServerClient | None = None
        self._sampler: Sampler | None = None
        self._burst: Burst | None = None
        self._weights_due = False
        self._stopped = False
        """True until the next `restart`."""
        self._closed = False
        """True after `stop`, for good."""
        self._renew()

    def _renew(self) -> None:
        """Make a new process, not launched yet, with a key of its own."""
        self._key = secrets.token_urlsafe(32)
        self._process = ServerProcess(self._name, self._place.log_path, hide=self._key)
        self._health = Health(self._name, self._process, self._settings)

    async def start(self) -> None:
        """Launch the server, wait until it answers, and sample once, to make the first rollout quick.

        Call it in a thread as long-lived as the engine: the server dies with its launching thread.

        Raises:
            ConfigError: refused `server_args`, or a checkpoint with unreadable routing facts.
            EngineError: the engine is missing or outside the version window, the server did not come up, or `stop` was
                called meanwhile.
        """
        checkpoint = resolve_checkpoint(self._role.checkpoint)
        facts = read_facts(checkpoint)
        if problems := self._parts.program.problems(facts):
            raise ConfigError("; ".join(problems))
        gpu_ids, tp_size = self._place.gpu_ids, self._settings.tp_size
        if self._place.device == "cuda" and len(gpu_ids) != tp_size:
            raise ConfigError(f"{self._name}: tp_size is {tp_size}, but it was given GPUs {gpu_ids}")
        now = asyncio.get_running_loop().time
        started = now()
        deadline = started + self._settings.startup_timeout
        startup = Startup(self._parts, self._process, self._key, self._name, closed=lambda: self._closed)
        try:
            client = await startup.launch(checkpoint, facts, deadline)
            sampler = self._connect(client, facts)
            warm_up = WarmUp(self._parts, client, sampler, self._health, self._name)
            async with asyncio.timeout_at(deadline):
                await warm_up.run(self._role, self._role.seed + self._place.engine_index)
            self._process.started()
        except TimeoutError as error:
            text = f"did not answer within {self._settings.startup_timeout:g} s (strategy_config.startup_timeout)"
            tail = self._process.log_tail()
            await self._end()
            raise EngineError(f"{self._name} {text}; the end of its log:\n{tail}") from error
        except BaseException:
            await self._end()
            raise
        logger.info("%s: up on port %d after %.1f s", self._name, client.port, now() - started)

    def _connect(self, client: ServerClient, facts: ModelFacts) -> Sampler:
        """Prepare requests to an answering server."""
        running = self._settings.max_running_requests
        if running is None:  # on a GPU the engine decides by itself
            running = CPU_SAMPLES if self._place.device == "cpu" else self._settings.max_concurrent_requests
        health = self._health
        sampler = Sampler(self._parts, client, facts, health, running_requests=running)
        self._client, self._sampler = client, sampler
        self._burst = Burst(lambda: health.kill_if_silent(client.alive), lambda: self._why_closed(client, sampler))
        return sampler

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample a group. Over all calls, up to `max_concurrent_requests` samples are in flight.

        Samples are lost if the server is down, or goes down before it returns them.

        Raises:
            EngineError: the server was not started, was stopped, or was restarted and has had no weights since.
        """
        sampler, burst = self._sampler, self._burst
        if sampler is None or burst is None or self._stopped:
            raise EngineError(f"{self._name} is not running: start() comes first, and nothing after stop()")
        if self._weights_due:
            raise EngineError(f"{self._name} was restarted and has the checkpoint's weights: an update comes first")
        if self._health.why_down():
            return GenerateResult(trajectories=(), lost=request.sample_ids)
        async with burst:
            if closed := await burst.why_closed():
                result = GenerateResult(trajectories=(), dropped=dict.fromkeys(request.sample_ids, closed))
            else:
                result = await sampler.generate(request)
            return await self._health.reclassify_dropped(result, burst)

    async def _why_closed(self, client: ServerClient, sampler: Sampler) -> str:
        try:
            return await self._health.until_exit(self._parts.status.why_closed(client, sampler.weight_version))
        except (SampleError, EngineError) as error:
            return str(error)

    async def why_down(self, *, ask: bool) -> str:
        """Return why the server needs a restart; empty if it is not down.

        Args:
            ask: request a sign of life; without one within `hang_timeout` the server is killed.
        """
        if self._client is None:
            raise EngineError(f"{self._name} is not running: start() comes first")
        if ask:
            await self._health.check(self._client.alive)
        return self._health.why_down()

    async def restart(self) -> None:
        """End the server if needed, and launch another with a port and a key of its own.

        It has the checkpoint's weights, under version 0, and gets no requests before `on_weights_updated`.

        Raises:
            ConfigError, EngineError: as `start`.
        """
        await self._end()
        self._renew()
        self._weights_due, self._stopped = True, False
        await self.start()

    async def on_weights_updated(self, version: int) -> None:
        """Accept answers of this weight version only. Call it after the weight channel's `end`."""
        if self._sampler is None:
            raise EngineError(f"{self._name} is not running: start() comes first")
        self._sampler.weights_updated(version)
        self._weights_due = False

    def weight_target(self) -> ServerTarget:
        """Return how a trainer, perhaps on another node, reaches this server."""
        if self._client is None:
            raise EngineError(f"{self._name} has no address yet: start() comes first")
        host = self._settings.host
        return ServerTarget(
            name=self._name,
            host=self._place.node_address if host in EVERY_ADDRESS else host,
            port=self._client.port,
            api_key=self._key,
            tp_size=self._settings.tp_size,
            dtype=self._settings.dtype,
        )

    async def stop(self, *, at_once: bool = False) -> None:
        """End the server and everything it started, for good.

        Safe to call twice, before `start`, and during `start` or `restart`; these then raise EngineError.
        """
        self._closed = True
        await self._end(at_once=at_once)

    async def _end(self, *, at_once: bool = False) -> None:
        """End the server; `restart` may follow."""
        self._stopped = True
        await self._process.stop(0.0 if at_once else GRACE_S)
        if self._client is not None:
            await self._client.close()
