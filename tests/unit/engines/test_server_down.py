"""Detection of a dead server from its answers; a sleeping program stands in for the server, and is killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import psutil
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines import health, server, startup
from roll_r3.engines.client import UnreachableError
from roll_r3.engines.process import _NOTE_S, ServerProcess
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.server import ServerRollout
from roll_r3.engines.sglang.codec import SglangCodec
from roll_r3.engines.sglang.strategy import SglangProgram, SglangRollout
from roll_r3.engines.startup import Startup, WarmUp
from roll_r3.errors import ConfigError, EngineError, RouteError
from roll_r3.models.facts import ModelFacts
from roll_r3.strategies.base import EnginePlace, GenerateRequest, GenerateResult

SAMPLING = Sampling(max_new_tokens=8)
REQUESTS = [
    GenerateRequest((1,), ("a0", "a1"), (0, 1), "group", SAMPLING, record_routes=True),
    GenerateRequest((2,), ("b0", "b1"), (2, 3), "group", SAMPLING, record_routes=True),
]

FACTS = ModelFacts("test", 1, (0,), 4, 2, 1, 1, 260, 64)


class Client:
    """A server's client: gives signs of life or none, and answers requests of `Codec`."""

    breathes = True
    port = 1

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[SampleRequest], Sample] = sample

    async def post(self, path: str, request: dict[str, Any], timeout_s: float, most_bytes: int) -> Sample:
        self.asked.append(request["wanted"].sample_id)
        try:
            return self.answer(request["wanted"])
        except Silence:
            await asyncio.Event().wait()
            raise

    async def alive(self, timeout_s: float) -> bool:
        await asyncio.sleep(0 if self.breathes else timeout_s)
        return self.breathes

    async def close(self) -> None: ...


class Codec:
    """Passes requests and samples as they are."""

    path = "/generate"

    def load(self) -> None: ...

    def kept_limit(self, asked: Asked) -> int:
        return 0

    def request(self, asked: Asked) -> dict[str, Any]:
        return {"wanted": asked.sample}

    def read(self, body: Any, asked: Asked, facts: ModelFacts) -> Sample:
        return body


class Silence(Exception):
    """No answer ever comes."""


def sample(wanted: SampleRequest) -> Sample:
    trajectory = Trajectory.one_turn(
        wanted.sample_id,
        wanted.group_id,
        prompt_ids=wanted.prompt_ids,
        response_ids=[wanted.seed],
        log_probs=[0.0],
        version=0,
        finish_reason="stop",
    )
    return Sample(trajectory, from_cache=True)


def run(tmp_path: Path, scenario: Callable[[ServerRollout], Awaitable[None]], *, hang_timeout: float = 60.0) -> None:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "test",
            "pretrain": "/models/tiny",
            "actor_train": {},
            "actor_infer": {
                "strategy_args": {
                    "strategy_name": "sglang",
                    "strategy_config": {"max_retries": 1, "hang_timeout": hang_timeout},
                }
            },
        }
    )

    async def with_a_server() -> None:
        engine = SglangRollout(engine_role(config), EnginePlace(0, "cpu", (), tmp_path / "log"))
        engine._parts = replace(engine._parts, codec=Codec())
        engine._process.launch([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
        engine._connect(Client(), FACTS)  # type: ignore[arg-type]
        try:
            await scenario(engine)
        finally:
            await engine.stop()

    asyncio.run(with_a_server())


async def generate(engine: ServerRollout, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
    """Ask for all of them at once."""
    return await asyncio.gather(*map(engine.generate, requests))


def answering(engine: ServerRollout, answer: Callable[[SampleRequest], Sample]) -> list[str]:
    """Have the engine answer like this; the ids of the samples that it is asked for."""
    assert isinstance(engine._client, Client)
    engine._client.answer = answer
    return engine._client.asked


def bad(wanted: SampleRequest) -> Sample:
    raise RouteError(f"{wanted.sample_id} has an expert twice")


def lost_of(results: list[GenerateResult]) -> list[tuple[str, ...]]:
    return [result.lost for result in results]


def test_an_engine_none_of_whose_answers_is_usable_is_down_and_asked_for_nothing_more(tmp_path: Path) -> None:
    async def scenario(engine: ServerRollout) -> None:
        asked = answering(engine, bad)
        results = await generate(engine, REQUESTS)
        assert lost_of(results) == [("a0", "a1"), ("b0", "b1")]
        assert not any(result.dropped for result in results)
        why = await engine.why_down(ask=True)
        assert "gave nothing usable: 4 samples of 2 prompts failed, with 1 retries each" in why
        assert "b1 has an expert twice" in why
        assert lost_of(await generate(engine, REQUESTS)) == [("a0", "a1"), ("b0", "b1")]
        assert len(asked) == 8

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("requests", "good"), [(REQUESTS[:1], ()), (REQUESTS, ("b1",))], ids=["one prompt", "one sample came"]
)
def test_samples_that_fail_beside_or_alone_are_dropped(
    tmp_path: Path, requests: list[GenerateRequest], good: tuple[str, ...]
) -> None:
    async def scenario(engine: ServerRollout) -> None:
        answering(engine, lambda wanted: sample(wanted) if wanted.sample_id in good else bad(wanted))
        results = await generate(engine, requests)
        assert lost_of(results) == [()] * len(requests)
        assert results[0].dropped.keys() == {"a0", "a1"}
        assert await engine.why_down(ask=True) == ""

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [SampleError("HTTP 500"), UnreachableError("reset")], ids=["refused", "unreachable"])
def test_what_a_dying_server_refuses_is_lost_not_dropped(tmp_path: Path, error: SampleError) -> None:
    """Notice its exit a moment later."""

    async def scenario(engine: ServerRollout) -> None:
        def answer(wanted: SampleRequest) -> Sample:
            if wanted.sample_id == "a0":
                return sample(wanted)
            os.kill(engine._process.pid or 0, signal.SIGKILL)
            raise error

        answering(engine, answer)
        results = await generate(engine, REQUESTS)
        assert [t.sample_id for t in results[0].trajectories] == ["a0"]
        assert lost_of(results) == [("a1",), ("b0", "b1")]
        assert not results[0].dropped and not results[1].dropped
        assert "engine 0 (SGLang) died" in await engine.why_down(ask=False)

    run(tmp_path, scenario)


def test_a_server_without_a_sign_of_life_is_killed_under_its_requests(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(health, "_REFUSED_S", 0.0)

    async def scenario(engine: ServerRollout) -> None:
        assert isinstance(engine._client, Client)
        engine._client.breathes = False

        def only_a0(wanted: SampleRequest) -> Sample:
            if wanted.sample_id == "a0":
                return sample(wanted)
            raise Silence

        answering(engine, only_a0)
        results = await generate(engine, REQUESTS)
        assert [t.sample_id for t in results[0].trajectories] == ["a0"]
        assert lost_of(results) == [("a1",), ("b0", "b1")]
        assert "gave no sign of life for 0.3 s (strategy_config.hang_timeout) and was killed" in await engine.why_down(
            ask=False
        )
        assert not engine._process.running

    run(tmp_path, scenario, hang_timeout=0.3)


def test_a_silent_server_without_requests_is_found_by_asking(tmp_path: Path) -> None:
    async def scenario(engine: ServerRollout) -> None:
        assert isinstance(engine._client, Client)
        assert await engine.why_down(ask=True) == ""
        engine._client.breathes = False
        assert await engine.why_down(ask=False) == ""
        assert "gave no sign of life" in await engine.why_down(ask=True)
        assert not engine._process.running

    run(tmp_path, scenario, hang_timeout=0.3)


def test_a_server_started_again_is_a_new_one_and_not_asked_before_its_weights(tmp_path: Path) -> None:
    async def scenario(engine: ServerRollout) -> None:
        answering(engine, bad)
        await generate(engine, REQUESTS)
        await engine.on_weights_updated(4)
        old, key = engine._process, engine._key

        async def start() -> None:
            engine._process.launch([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
            engine._connect(Client(), FACTS)  # type: ignore[arg-type]

        engine.start = start  # type: ignore[method-assign]
        await engine.restart()
        assert not old.running and engine._process.running
        assert engine._key != key
        assert engine._sampler is not None and engine._sampler.weight_version == 0, "as its server says"
        assert await engine.why_down(ask=True) == ""
        with pytest.raises(EngineError, match="has the checkpoint's weights: an update comes first"):
            await generate(engine, REQUESTS)
        await engine.on_weights_updated(4)
        answering(engine, sample)
        assert [len(result.trajectories) for result in await generate(engine, REQUESTS)] == [2, 2]

    run(tmp_path, scenario)


@pytest.fixture
def startable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a start of any checkpoint reach the launch."""
    monkeypatch.setattr(server, "resolve_checkpoint", lambda _: Path("/models/tiny"))
    monkeypatch.setattr(server, "read_facts", lambda _: None)
    monkeypatch.setattr(SglangProgram, "problems", lambda *_: [])
    monkeypatch.setattr(SglangProgram, "environment", lambda *_: dict(os.environ))
    monkeypatch.setattr(SglangProgram, "check_version", lambda *_: None)


@pytest.mark.usefixtures("startable")
@pytest.mark.parametrize("method", ["start", "restart"])
def test_nothing_is_launched_by_a_start_under_which_the_engine_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def scenario(engine: ServerRollout) -> None:
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def installed_version(*_: object) -> str:
            reached.set()
            await go_on.wait()
            return "0.0.0"

        monkeypatch.setattr(Startup, "_installed_version", installed_version)
        monkeypatch.setattr(ServerProcess, "launch", lambda *_: pytest.fail("launched"))
        starting = asyncio.create_task(getattr(engine, method)())
        await reached.wait()
        await engine.stop()
        go_on.set()
        with pytest.raises(EngineError, match=r"engine 0 \(SGLang\) is not started: it was stopped for good meanwhile"):
            await starting
        with pytest.raises(EngineError, match="stopped for good"):
            await engine.restart()

    run(tmp_path, scenario)


@pytest.mark.usefixtures("startable")
def test_a_start_that_could_not_read_the_model_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [ConfigError("config.json cannot be read: [Errno 5] Input/output error")]

    def read_facts(_: object) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(server, "read_facts", read_facts)

    async def scenario(engine: ServerRollout) -> None:
        async def launch(*_: object) -> Client:
            engine._process.launch(["sleep", "600"], os.environ)
            return Client()

        monkeypatch.setattr(Startup, "launch", launch)
        monkeypatch.setattr(WarmUp, "run", AsyncMock())
        with pytest.raises(ConfigError, match="Input/output error"):
            await engine.restart()
        await engine.restart()
        assert await engine.why_down(ask=True) == ""

    run(tmp_path, scenario)


TAKEN = """
import mmap, os, subprocess, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(file, 4096)
held = mmap.mmap(file, 4096)
child = subprocess.Popen(["sleep", "600"])
time.sleep(float(sys.argv[2]))
print("child", child.pid, "error: [Errno 98] Address already in use", flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux's shared memory")
@pytest.mark.usefixtures("startable")
def test_an_attempt_whose_port_was_taken_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [Path(f"/dev/shm/roll_r3_test_{os.getpid()}_{attempt}") for attempt in range(startup.LAUNCHES)]
    attempts = iter(held)

    async def scenario(engine: ServerRollout) -> None:
        def command(*_: object) -> list[str]:
            return [sys.executable, "-c", TAKEN, str(next(attempts)), str(4 * _NOTE_S)]

        monkeypatch.setattr(SglangProgram, "command", command)
        monkeypatch.setattr(Startup, "_installed_version", AsyncMock(return_value="0.0.0"))
        await engine._process.stop(grace_s=0.0)
        with pytest.raises(EngineError, match=r"did not start: process \d+ exited with code 0"):
            await engine.start()
        await engine.stop()

    try:
        run(tmp_path, scenario)
        children = re.findall(r"child (\d+)", (tmp_path / "log").read_text())
        assert len(children) == len(held)
        assert not [path for path in held if path.exists()]
        living = [int(pid) for pid in children if psutil.pid_exists(int(pid))]
        assert not [pid for pid in living if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    finally:
        for path in held:
            path.unlink(missing_ok=True)


@pytest.mark.usefixtures("startable")
def test_an_interpreter_that_never_says_what_it_has_is_given_up_and_killed(tmp_path: Path) -> None:
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {said}\nwait\n")
    python.chmod(0o755)

    async def scenario(engine: ServerRollout) -> None:
        settings = engine._settings.model_copy(update={"python": str(python), "startup_timeout": 1.0})
        program = SglangProgram(engine._role, engine._place, settings, SglangCodec())
        engine._parts, engine._settings = replace(engine._parts, program=program, settings=settings), settings
        with pytest.raises(
            EngineError, match=r"did not report its SGLang release within 1 s \(strategy_config.startup_timeout\)"
        ):
            await asyncio.wait_for(engine.start(), 30)
        child = int(said.read_text())
        while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)

    run(tmp_path, scenario)
