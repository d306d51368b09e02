"""Cost of recording routes in a rollout, and saving by fetching a prompt's rows once per group; SGLang on a CPU.

    .venv/bin/python -m examples.benchmarks rollout_routes

Two servers of one tiny model run side by side, with recording and without, otherwise with the same flags. Each round
requests, one after another and in alternating order,

    none       the server without recording
    each       the server with recording; every sample fetches all its rows
    shared     the same server; one sample of a group fetches the prompt's rows

with prompts new to the servers. Figures: response tokens per second, processor time of server and client per token
(steadier on a busy machine), and bytes of a sample's answers, the group's first request included. Also the time of
decoding one long answer, and the time for which it blocks an event loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from examples.benchmarks.measuring import Report, ratio
from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.sample import Asked, SampleRequest
from roll_r3.engines.sglang.codec import SglangCodec
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.models.facts import ModelFacts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import EnginePlace, GenerateRequest


@dataclass(frozen=True)
class Shape:
    """Requests of a round."""

    rounds: int
    prompt: int = 256
    """Number of tokens."""
    response: int = 64
    """Maximum number of tokens."""
    groups: int = 4
    samples: int = 8
    """Number of samples per group."""
    rows: int = 8192
    """Length of the decoded answer."""
    layers: int = 48
    experts: int = 128
    top_k: int = 8


@dataclass
class Round:
    tokens_per_s: float
    bytes_per_sample: float
    cpu_us_per_token: float
    """Processor time of the server's processes and of this one."""


def make_engine(shape: Shape, checkpoint: Path, folder: Path, mode: str) -> SglangRollout:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "benchmark",
            "pretrain": str(checkpoint),
            "prompt_length": shape.prompt,
            "response_length": shape.response,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": mode},
                "strategy_args": {
                    "strategy_name": "sglang",
                    "strategy_config": {
                        "dtype": "bfloat16",
                        "max_running_requests": shape.groups * shape.samples,
                        # else the server that waits takes a core from the other
                        "server_args": {"sleep_on_idle": True},
                        "max_total_tokens": 2 * shape.groups * shape.samples * (shape.prompt + shape.response),
                    },
                },
            },
        }
    )
    return SglangRollout(engine_role(config), EnginePlace(0, "cpu", (), folder / f"{mode}.log"))


def draw(shape: Shape, rng: np.random.Generator) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt_ids=tuple(int(token) for token in rng.integers(0, 256, shape.prompt)),
            sample_ids=tuple(f"p{group}/s{sample}" for sample in range(shape.samples)),
            seeds=tuple(int(seed) for seed in rng.integers(1 << 31, size=shape.samples)),
            group_id=f"p{group}",
            sampling=Sampling(shape.response),
            record_routes=True,
        )
        for group in range(shape.groups)
    ]


async def one_round(engine: SglangRollout, page: int, requests: list[GenerateRequest]) -> Round:
    sampler, client, num_bytes = engine._sampler, engine._client, 0
    assert sampler is not None and client is not None
    sampler.sharing.engine_keeps(page)
    post = client.post

    async def counted(path: str, request: dict[str, Any], timeout_s: float, *most_bytes: int) -> bytes:
        nonlocal num_bytes
        body = await post(path, request, timeout_s, *most_bytes)
        num_bytes += len(body)
        return body

    client.post = counted  # type: ignore[method-assign, assignment]
    start, cpu_start = time.perf_counter(), cpu_seconds(engine)
    results = await asyncio.gather(*map(engine.generate, requests))
    seconds, cpu = time.perf_counter() - start, cpu_seconds(engine) - cpu_start
    client.post = post  # type: ignore[method-assign]
    samples = [trajectory for result in results for trajectory in result.trajectories]
    if any(result.retries or result.dropped or result.lost for result in results):
        raise SystemExit("a sample had to be asked for again: the figures would not be those of one round")
    tokens = sum(len(t.response_ids) for t in samples)
    return Round(tokens / seconds, num_bytes / len(samples), 1e6 * cpu / tokens)


def cpu_seconds(engine: SglangRollout) -> float:
    server = psutil.Process(engine._process.pid)
    processes = [psutil.Process(), server, *server.children(recursive=True)]
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


async def rounds_of(shape: Shape, checkpoint: Path, folder: Path) -> dict[str, list[Round]]:
    plain, recording = (make_engine(shape, checkpoint, folder, mode) for mode in ("disable", "R3"))
    rng = np.random.default_rng(0)
    kinds = {"none": (plain, 0), "each": (recording, 0), "shared": (recording, 1)}
    rounds: dict[str, list[Round]] = {kind: [] for kind in kinds}
    try:
        await asyncio.gather(plain.start(), recording.start())
        for number in range(-1, shape.rounds):
            order = list(kinds)
            turn = number % len(order)
            for kind in order[turn:] + order[:turn]:
                engine, page = kinds[kind]
                found = await one_round(engine, page, draw(shape, rng))
                if number >= 0:  # the first is to warm up
                    rounds[kind].append(found)
    finally:
        await asyncio.gather(plain.stop(), recording.stop())
    return rounds


def long_answer(rows: int, layers: int, experts: int, top_k: int) -> tuple[bytes, Asked, ModelFacts]:
    """Make an answer in SGLang's form, for a prompt of one token."""
    rng = np.random.default_rng(0)
    scores = rng.random((256 * layers, experts), dtype=np.float32)
    ids_RLK = np.argsort(scores)[:, :top_k].astype("<i4").reshape(256, layers, top_k)
    ids_RLK = np.resize(ids_RLK, (rows, layers, top_k))
    meta = {
        "finish_reason": {"type": "length"},
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "num_retractions": 0,
        "weight_version": "0",
        "output_token_logprobs": [[-0.123456789, token, None] for token in range(rows)],
        "routed_experts": base64.b64encode(ids_RLK.tobytes()).decode(),
    }
    body = json.dumps({"text": "", "output_ids": list(range(rows)), "meta_info": meta}).encode()
    facts = ModelFacts("benchmark", layers, tuple(range(layers)), experts, top_k, 1, 1, 2 * rows, 2 * rows)
    return body, Asked(SampleRequest((0,), "s", 0, Sampling(rows)), 0), facts


async def decoding(shape: Shape) -> dict[str, float]:
    body, asked, facts = long_answer(shape.rows, shape.layers, shape.experts, shape.top_k)
    times, pauses, done = [], [], False

    async def tick() -> None:
        last = time.perf_counter()
        while not done:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    longest = []
    for _ in range(15):
        start = time.perf_counter()
        await asyncio.to_thread(SglangCodec().read, body, asked, facts)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(0.002)
        longest.append(max(pauses))
        pauses.clear()
    done = True
    await ticking
    return {
        "rows": shape.rows,
        "megabytes": round(len(body) / 1e6, 2),
        "ms": round(1e3 * statistics.median(times), 2),
        "longest_pause_over_decoding": round(statistics.median(longest) / statistics.median(times), 3),
    }


def measure(rounds: int) -> Report:
    """Measure all figures."""
    shape = Shape(rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "model", seed=0)
        found = asyncio.run(rounds_of(shape, checkpoint, Path(folder)))

    def of(kind: str, figure: str) -> list[float]:
        return [getattr(one, figure) for one in found[kind]]

    return {
        "shape": asdict(shape),
        "bytes_per_sample": {kind: round(statistics.median(of(kind, "bytes_per_sample"))) for kind in found},
        "over": {
            f"{kind} over {to}": {
                figure: ratio(of(kind, figure), of(to, figure)) for figure in ("tokens_per_s", "cpu_us_per_token")
            }
            for kind, to in (("each", "none"), ("shared", "none"), ("shared", "each"))
        },
        "decoding": asyncio.run(decoding(shape)),
    }
