"""Rollout by one server: launched, watched, asked for samples, and ended by its strategy."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from roll_r3.config.derived import checkpoint_of, engine_room, sampled_tokens
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import ServerConfig
from roll_r3.engines.answers import Asked
from roll_r3.engines.burst import Burst
from roll_r3.engines.client import ServerClient, UnreachableError
from roll_r3.engines.liveness import answers, until_silent
from roll_r3.engines.process import GRACE_S, ServerProcess, free_port, signal_group
from roll_r3.engines.sampling import Sample, SampleError, SampleRequest, sample_group
from roll_r3.engines.server_args import CPU_SAMPLES, EVERY_ADDRESS
from roll_r3.engines.sharing import LEAST_ROWS, PromptSharing
from roll_r3.engines.slots import Slots
from roll_r3.errors import ConfigError, EngineError, RouteError
from roll_r3.models.checkpoint import resolve_checkpoint
from roll_r3.models.facts import ModelFacts, read_facts
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.weights.target import ServerTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound=ServerConfig)

_LAUNCHES = 3
"""How often a server is launched anew because another process was quicker to take its port."""
_EXIT_S = 1.0
"""After a server failed a request: if the server is dying, its exit is noticed within this time."""
_WARM_UP_PROMPT = (0, 1, 2, 3)
_WARM_UP_TOKENS = 2


class ServerRollout(ABC, Generic[ConfigT]):
    """One engine. Implements `roll_r3.strategies.base.RolloutStrategy`; a subclass says how its engine is spoken to.

    Weight versions: the server starts at 0. A weight channel raises the server's version; after its `end()` returned,
    `on_weights_updated` must be told the same number. Until both agree every answer is refused, so nothing sampled
    from old or half-written weights can pass.

    A server that dies, gives no sign of life or nothing usable is down: nothing more is asked of it until `restart`.
    """

    engine: ClassVar[str]
    """What people call it."""
    package: ClassVar[str]
    """The distribution that an interpreter must have."""
    generate_path: ClassVar[str]
    keyed_path: ClassVar[str]
    """Something cheap to GET that the part of the server which generates must answer, and to whoever has the key only.

    No generation: one more in its batches could change the last bits of the others."""

    def __init__(
        self,
        *,
        config: RLVRConfig,
        engine_index: int,
        device: str,
        gpu_ids: tuple[int, ...],
        log_path: Path,
        node_address: str = "127.0.0.1",
    ) -> None:
        """
        Args:
            config: the run's; this role is `config.actor_infer`.
            engine_index: number of this engine in the role; names it and varies its server's seed.
            device: "cpu" or "cuda".
            gpu_ids: the GPUs that the server sees; without meaning on a CPU.
            log_path: the server's output.
            node_address: where other nodes reach this one, for a server that binds to every address.
        """
        role = config.actor_infer
        self._config: ConfigT = role.strategy_args.strategy_config  # type: ignore[assignment]
        self._model_args = role.model_args
        self._model_path = checkpoint_of(config, "actor_infer")
        self._generating = role.generating_args
        self._max_new_tokens = sampled_tokens(config)
        self._wanted_context = engine_room(config)
        self._longest_prompt = config.prompt_length
        self._record_routes = role.router_replay.mode == "R3"
        self._fp32_lm_head = config.fp32_lm_head
        self._seed = config.seed + engine_index
        self._device = device
        self._node_address = node_address
        self._gpu_ids = gpu_ids
        self._name = f"engine {engine_index} ({self.engine})"
        self._log_path = log_path
        self._renew()
        self._port = 0
        self._client: ServerClient | None = None
        self._facts: ModelFacts | None = None
        self._slots = Slots(self._config.max_concurrent_requests)
        self._sharing = PromptSharing(
            self._ask_or_wait, self._prime, self._recomputed, self._slots, at_once=self._at_once(device)
        )
        self._burst = Burst(self._kill_if_silent, self._why_closed)
        self._weight_version = 0
        self._weights_due = False
        self._verdict = ""
        self._stopped = False
        """Until the next `restart`."""
        self._closed = False
        """For good."""

    def _renew(self) -> None:
        """A process that was not launched yet, with a key of its own."""
        self._key = secrets.token_urlsafe(32)
        self._process = ServerProcess(self._name, self._log_path, hide=self._key)

    @property
    @abstractmethod
    def python(self) -> str:
        """The interpreter that runs the server."""

    @abstractmethod
    def problems(self, facts: ModelFacts) -> list[str]:
        """Why the engine cannot run as configured. Empty when it can."""

    @abstractmethod
    def check_version(self, text: str) -> str | None:
        """What to warn about, or None; raises EngineError for a release outside the window."""

    @abstractmethod
    def command(self, checkpoint: str, facts: ModelFacts, port: int) -> list[str]:
        """What starts the server. Without the key: anybody can read a command line."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What the server starts with; the key is in it."""

    @abstractmethod
    def request(self, asked: Asked) -> dict[str, Any]:
        """The body that asks for one sample."""

    @abstractmethod
    def read(self, body: bytes, asked: Asked, facts: ModelFacts) -> Sample:
        """The checked answer. Raises SampleError or RouteError. Runs in a thread beside the event loop."""

    @abstractmethod
    async def cache_page(self, client: ServerClient) -> int:
        """Tokens of a page of the prefix cache, of which the engine keeps whole ones only; 0 when it keeps none.

        Raises SampleError when the server does not say."""

    async def recomputed(self, client: ServerClient) -> int:
        """How often so far the engine threw away what a sample had computed, where its answers do not say so; raises
        SampleError when the server does not say."""
        return 0

    async def prepare(self, client: ServerClient) -> None:
        """What is left to be done once the server answers; raises SampleError when it fails."""

    async def why_closed(self, client: ServerClient) -> str:
        """Why the engine would not answer requests at all just now; empty when it would."""
        return ""

    async def start(self) -> None:
        """Launch the server, wait until it answers, and sample once, checked, so that the first rollout is quick.

        Call it in a thread that lives as long as the engine: the server dies with the thread that launched it.

        Raises:
            ConfigError: refused `server_args`, or a checkpoint whose routing facts cannot be read.
            EngineError: the engine is missing or outside the version window, the server did not come up, or `stop` was
                called before it could.
        """
        checkpoint = resolve_checkpoint(self._model_path)
        self._facts = read_facts(checkpoint)
        if problems := self.problems(self._facts):
            raise ConfigError("; ".join(problems))
        if self._device == "cuda" and len(self._gpu_ids) != self._config.tp_size:
            raise ConfigError(f"{self._name}: tp_size is {self._config.tp_size}, but it was given GPUs {self._gpu_ids}")
        environment = self.environment()
        started = asyncio.get_running_loop().time()
        limit = started + self._config.startup_timeout
        version = await self._installed_version(environment, limit)
        if warning := self.check_version(version):
            logger.warning("%s: %s", self._name, warning)
        logger.info("%s: starting %s %s, its log is %s", self._name, self.engine, version, self._process.log_path)
        try:
            async with asyncio.timeout_at(limit):
                client = await self._launch(str(checkpoint), self._facts, environment)
                await self._warm_up(client)
                self._process.started()
        except TimeoutError as error:
            text = f"did not answer within {self._config.startup_timeout:g} s (strategy_config.startup_timeout)"
            tail = self._process.log_tail()
            await self._end()
            raise EngineError(f"{self._name} {text}; the end of its log:\n{tail}") from error
        except BaseException:
            await self._end()
            raise
        seconds = asyncio.get_running_loop().time() - started
        logger.info("%s: up on port %d after %.1f s", self._name, self._port, seconds)

    async def _installed_version(self, environment: dict[str, str], limit: float) -> str:
        """The release of the interpreter that will run the server, which may not be this one.

        Args:
            limit: when it must have said so, on the loop's clock.
        """
        code = f"from importlib.metadata import version; print(version({self.package!r}))"
        try:
            process = await asyncio.create_subprocess_exec(
                self.python,
                "-c",
                code,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"{self._name}: cannot run strategy_config.python {self.python!r}: {error}") from error
        try:
            async with asyncio.timeout_at(limit):
                output, errors = await process.communicate()
        except BaseException as error:
            signal_group(process.pid, signal.SIGKILL)  # as a wrapper's child, the interpreter has a process of its own
            await process.wait()
            if not isinstance(error, TimeoutError):
                raise
            raise EngineError(
                f"{self._name}: strategy_config.python {self.python!r} did not say within "
                f"{self._config.startup_timeout:g} s (strategy_config.startup_timeout) which {self.engine} it has"
            ) from error
        if process.returncode:
            said = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise EngineError(
                f"{self._name}: {self.python} has no {self.engine} ({said}); "
                "install it there, or point strategy_config.python at an interpreter that has it"
            )
        return output.decode().strip()

    async def _launch(self, checkpoint: str, facts: ModelFacts, environment: dict[str, str]) -> ServerClient:
        for attempt in range(1, _LAUNCHES + 1):
            if self._closed:
                raise EngineError(f"{self._name} is not started: it was stopped for good meanwhile")
            self._port = free_port(self._config.host)
            self._process.launch(self.command(checkpoint, facts, self._port), environment)
            client = ServerClient(self._config.host, self._port, self._key, keyed_path=self.keyed_path)
            self._client = client
            while self._process.running:
                if await client.healthy(timeout_s=30.0):
                    return client
                await asyncio.sleep(0.2)
            await client.close()
            if attempt == _LAUNCHES or "address already in use" not in self._process.log_tail(200).lower():
                raise EngineError(f"{self._name} did not start: {self._process.obituary()}")
            logger.warning("%s: port %d was taken, trying another", self._name, self._port)
            await self._process.stop(grace_s=0.0)  # its children may not have noticed yet
        raise AssertionError("the last attempt returned or raised")

    async def _warm_up(self, client: ServerClient) -> None:
        """The first generation fills a compile cache and can take half a minute; it also proves the route contract."""
        try:
            await self._or_death(self.prepare(client))
            await self._or_death(
                self._ask(SampleRequest(_WARM_UP_PROMPT, "warm-up", self._seed), max_new_tokens=_WARM_UP_TOKENS)
            )
            if self._record_routes:
                await self._or_death(self._find_out_what_is_kept(client))
        except (SampleError, RouteError) as error:
            raise EngineError(f"{self._name}: its first answer is not usable: {error}") from error

    async def _find_out_what_is_kept(self, client: ServerClient) -> None:
        """Share the rows of a prompt between samples only where the engine was seen to keep prompts, and keys apart.

        Whatever goes wrong, the engine can still be asked for all rows of every sample.
        """
        try:
            why_not = await self._why_not_shared(client)
        except (SampleError, RouteError) as error:
            why_not = str(error)
        if why_not:
            self._sharing.engine_keeps(0)
            logger.warning("%s: every sample fetches its prompt's routes itself: %s", self._name, why_not)

    async def _why_not_shared(self, client: ServerClient) -> str:
        """Tries it, with a prompt as short as it is worth; empty when prompts are shared, or none can be that long."""
        if self._longest_prompt <= LEAST_ROWS:
            return ""
        page = await self.cache_page(client)
        await self.recomputed(client)
        if not page:
            return "its prefix cache is off"
        rows = -(-LEAST_ROWS // page) * page
        if rows >= self._longest_prompt:
            return ""
        prompt_ids = (_WARM_UP_PROMPT * rows)[: rows + 1]
        wanted = SampleRequest(prompt_ids, "warm-up", self._seed, rows, rows, "warm-up")
        await self._prime(wanted)
        if not (await self._ask(wanted, max_new_tokens=1)).from_cache:
            return f"it keeps no prompt of {rows + 1} tokens from one request to the next"
        if (await self._ask(replace(wanted, cache_key="another"), max_new_tokens=1)).from_cache:
            return "it finds a prompt under another key than the one it was stored under"
        self._sharing.engine_keeps(page)
        return ""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample a group. Over all calls, up to `max_concurrent_requests` samples are waited for at once.

        A server that goes down under the request, or is down already, leaves the samples that it did not bring lost.

        Raises:
            EngineError: the server was not started, was stopped, or was started again and not given weights since.
        """
        if self._client is None or self._stopped:
            raise EngineError(f"{self._name} is not running: start() comes first, and nothing after stop()")
        if self._weights_due:
            raise EngineError(f"{self._name} was started again and has the checkpoint's weights: an update comes first")
        if self._why_ended():
            return GenerateResult(trajectories=(), lost=request.sample_ids)
        async with self._burst:
            return await self._judged(await self._sample_open(request))

    async def _sample_open(self, request: GenerateRequest) -> GenerateResult:
        if closed := await self._burst.closed():
            return GenerateResult(trajectories=(), dropped=dict.fromkeys(request.sample_ids, closed))
        return await sample_group(request, self._ask_in_turn, self._sharing, self._config.max_retries)

    async def _why_closed(self) -> str:
        assert self._client is not None, "start() comes first"
        try:
            return await self._or_death(self.why_closed(self._client))
        except (SampleError, EngineError) as error:
            return str(error)

    async def _kill_if_silent(self) -> None:
        assert self._client is not None, "start() comes first"
        await until_silent(self._client.alive, self._config.hang_timeout)
        await self._kill_as_hung()

    async def _kill_as_hung(self) -> None:
        self._verdict = (
            f"{self._name} gave no sign of life for {self._config.hang_timeout:g} s (strategy_config.hang_timeout) and "
            f"was killed; the end of {self._log_path}:\n{self._process.log_tail()}"
        )
        logger.warning("%s", self._verdict)
        await self._process.stop(grace_s=0.0)

    async def _judged(self, result: GenerateResult) -> GenerateResult:
        """Return samples dropped by an engine that is down as lost: another may bring them."""
        if result.trajectories:
            self._burst.brought()
        if not result.dropped:
            return result
        await asyncio.wait([self._process.death], timeout=_EXIT_S)
        nothing_came = len(result.dropped) == _asked(result)
        failed = await self._burst.brought_nothing(result) if nothing_came else []
        if failed and not self._why_ended():
            self._verdict = self._useless(failed)
            logger.warning("%s", self._verdict)
        if not self._why_ended():
            return result
        return replace(result, dropped={}, lost=(*result.lost, *result.dropped))

    def _useless(self, failed: Sequence[GenerateResult]) -> str:
        reasons = [reason for result in failed for reason in result.dropped.values()]
        return (
            f"{self._name} gave nothing usable: {len(reasons)} samples of {len(failed)} prompts failed, "
            f"with {self._config.max_retries} retries each (strategy_config.max_retries); the last: {reasons[-1]}"
        )

    def _why_ended(self) -> str:
        """Why nothing more is asked of this server, with the end of its log; empty while something is."""
        if not self._verdict and self._process.death.done():
            return f"{self._name} died: {self._process.obituary()}"
        return self._verdict

    async def why_down(self, *, ask: bool) -> str:
        """Why the server is of no more use until `restart`; empty when it is.

        Args:
            ask: have it give a sign of life; one that gives none within `hang_timeout` is killed.
        """
        if self._client is None:
            raise EngineError(f"{self._name} is not running: start() comes first")
        if ask and not self._why_ended():
            try:
                alive = await self._or_death(answers(self._client.alive, self._config.hang_timeout))
            except EngineError:
                alive = True  # it was, until it died: that says more
            if not alive:
                await self._kill_as_hung()
        return self._why_ended()

    async def restart(self) -> None:
        """End what is left of the server and launch another, with a port and a key of its own.

        It may not be asked before `on_weights_updated`: it has the checkpoint's weights, under version 0.

        Raises:
            ConfigError, EngineError: as `start`.
        """
        await self._end()
        self._renew()
        self._weight_version, self._weights_due = 0, True
        self._verdict, self._stopped = "", False
        await self.start()

    async def _or_death(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, or EngineError as soon as the server's process is gone."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._process.death], return_when=asyncio.FIRST_COMPLETED)
            if self._process.death.done() and (not task.done() or task.exception() is not None):
                raise EngineError(f"{self._name} died: {self._process.obituary()}")
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _ask_in_turn(self, wanted: SampleRequest) -> Sample:
        async with self._slots.hold():
            return await self._ask_or_wait(wanted)

    async def _ask_or_wait(self, wanted: SampleRequest) -> Sample:
        """Raises EngineError when the server dies, or is dead."""
        if self._process.death.done():
            raise EngineError(f"{self._name} died")  # thousands may wait in line: no look into the log for each
        try:
            return await self._or_death(self._ask(wanted, max_new_tokens=self._max_new_tokens))
        except UnreachableError:
            await self._or_death(asyncio.sleep(_EXIT_S))
            raise

    async def _ask(self, wanted: SampleRequest, *, max_new_tokens: int) -> Sample:
        return await self._answer_to(
            Asked(
                sample=wanted,
                max_new_tokens=max_new_tokens,
                weight_version=self._weight_version,
                record_routes=self._record_routes,
                stop_strings=self._generating.stop_strings,
            )
        )

    async def _prime(self, wanted: SampleRequest) -> None:
        """Have the prompt computed. The rows of this request itself may be those of a copy that the cache refused."""
        asked = Asked(sample=wanted, max_new_tokens=1, weight_version=self._weight_version, record_routes=False)
        await self._or_death(self._answer_to(asked))

    async def _recomputed(self) -> int:
        assert self._client is not None, "start() comes first"
        return await self.recomputed(self._client)

    def _at_once(self, device: str) -> int:
        """Samples that the engine decodes at once; on a GPU it decides by itself unless it is told."""
        return self._config.max_running_requests or (CPU_SAMPLES if device == "cpu" else self._slots.total)

    async def _answer_to(self, asked: Asked) -> Sample:
        assert self._client is not None, "start() comes first"
        assert self._facts is not None, "start() comes first"
        body = await self._client.post(
            self.generate_path, self.request(asked), self._config.request_timeout, asked.most_bytes(self._facts)
        )
        return await asyncio.to_thread(self.read, body, asked, self._facts)

    async def on_weights_updated(self, version: int) -> None:
        """Answers must come from this weight version from now on. Call it when the weight channel's `end` returned."""
        self._weight_version, self._weights_due = version, False
        self._sharing.weights_changed()

    @property
    def reachable_host(self) -> str:
        """Where a trainer, perhaps on another node, reaches this server."""
        return self._node_address if self._config.host in EVERY_ADDRESS else self._config.host

    def weight_target(self) -> ServerTarget:
        if self._client is None:
            raise EngineError(f"{self._name} has no address yet: start() comes first")
        return ServerTarget(
            name=self._name,
            host=self.reachable_host,
            port=self._port,
            api_key=self._key,
            tp_size=self._config.tp_size,
            dtype=self._config.dtype,
        )

    async def stop(self, *, at_once: bool = False) -> None:
        """End the server and everything it started, for good. Safe to call twice, before `start`, and while that or
        `restart` is under way, which then fails."""
        self._closed = True
        await self._end(at_once=at_once)

    async def _end(self, *, at_once: bool = False) -> None:
        """`restart` may follow."""
        self._stopped = True
        await self._process.stop(0.0 if at_once else GRACE_S)
        if self._client is not None:
            await self._client.close()


def _asked(result: GenerateResult) -> int:
    """How many samples a result is about."""
    return len(result.trajectories) + len(result.dropped) + len(result.lost)
