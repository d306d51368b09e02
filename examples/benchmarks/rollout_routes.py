"""What recording routes costs a rollout, and what fetching a prompt's rows once for its group saves; SGLang on a CPU.

    .venv/bin/python examples/benchmarks/rollout_routes.py

Two servers of one tiny model stand side by side, with recording and without, their flags otherwise the same. Each round
asks, one after another and in an order that turns, for

    none       the server without recording
    each       the server with recording; every sample fetches all its rows
    shared     the same server; one sample of a group fetches the prompt's rows

with prompts that no server has seen. Prints one JSON object: medians over the rounds of response tokens a second, of
the processor time that server and client spend on a token (steadier on a busy machine) and of the bytes that a sample's
answers hold, the group's first request counted in; medians of the rounds' ratios; and what decoding one long answer
takes: how long, and how long it keeps an event loop from turning.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.models.facts import ModelFacts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.strategies.base import GenerateRequest
from roll_r3.strategies.rollout.answers import Asked
from roll_r3.strategies.rollout.sampling import SampleRequest
from roll_r3.strategies.rollout.sglang.payload import read_sample
from roll_r3.strategies.rollout.sglang.strategy import SglangRollout


@dataclass
class Round:
    tokens_per_s: float
    bytes_per_sample: float
    cpu_us_per_token: float
    """Of the server's processes and of this one."""


def make_engine(args: argparse.Namespace, checkpoint: Path, folder: Path, mode: str) -> SglangRollout:
    config = RLVRConfig.model_validate(
        {
            "exp_name": "benchmark",
            "pretrain": str(checkpoint),
            "prompt_length": args.prompt,
            "response_length": args.response,
            "actor_train": {},
            "actor_infer": {
                "router_replay": {"mode": mode},
                "strategy_args": {
                    "strategy_name": "sglang",
                    "strategy_config": {
                        "dtype": "bfloat16",
                        "max_running_requests": args.groups * args.samples,
                        "server_args": {
                            "sleep_on_idle": True
                        },  # else the server that waits takes a core from the other
                        "max_total_tokens": 2 * args.groups * args.samples * (args.prompt + args.response),
                    },
                },
            },
        }
    )
    return SglangRollout(config=config, engine_index=0, device="cpu", gpu_ids=(), log_path=folder / f"{mode}.log")


def draw(args: argparse.Namespace, rng: np.random.Generator) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            prompt_ids=tuple(int(token) for token in rng.integers(0, 256, args.prompt)),
            sample_ids=tuple(f"p{group}/s{sample}" for sample in range(args.samples)),
            seeds=tuple(int(seed) for seed in rng.integers(1 << 31, size=args.samples)),
        )
        for group in range(args.groups)
    ]


async def one_round(engine: SglangRollout, page: int, requests: list[GenerateRequest]) -> Round:
    engine._sharing.engine_keeps(page)
    client, num_bytes = engine._client, 0
    assert client is not None
    post = client.post

    async def counted(path: str, request: dict[str, Any], timeout_s: float) -> bytes:
        nonlocal num_bytes
        body = await post(path, request, timeout_s)
        num_bytes += len(body)
        return body

    client.post = counted  # type: ignore[method-assign]
    start, cpu_start = time.perf_counter(), cpu_seconds(engine)
    results = await engine.generate(requests)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(engine) - cpu_start
    client.post = post  # type: ignore[method-assign]
    samples = [trajectory for result in results for trajectory in result.trajectories]
    if any(result.retries or result.dropped for result in results):
        raise SystemExit("a sample had to be asked for again: the figures would not be those of one round")
    tokens = sum(len(t.response_ids_R) for t in samples)
    return Round(tokens / seconds, num_bytes / len(samples), 1e6 * cpu / tokens)


def cpu_seconds(engine: SglangRollout) -> float:
    server = psutil.Process(engine._process.pid)
    processes = [psutil.Process(), server, *server.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def rounds_of(args: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, list[Round]]:
    plain, recording = (make_engine(args, checkpoint, folder, mode) for mode in ("disable", "R3"))
    rng = np.random.default_rng(0)
    kinds = {"none": (plain, 0), "each": (recording, 0), "shared": (recording, 1)}
    rounds: dict[str, list[Round]] = {kind: [] for kind in kinds}
    try:
        await asyncio.gather(plain.start(), recording.start())
        for number in range(-1, args.rounds):
            order = list(kinds)
            turn = number % len(order)
            for kind in order[turn:] + order[:turn]:
                engine, page = kinds[kind]
                found = await one_round(engine, page, draw(args, rng))
                if number >= 0:  # the first is to warm up
                    rounds[kind].append(found)
    finally:
        await asyncio.gather(plain.stop(), recording.stop())
    return rounds


def long_answer(rows: int, layers: int, experts: int, top_k: int) -> tuple[bytes, Asked, ModelFacts]:
    """As SGLang would write it, of a prompt of one token."""
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
    return body, Asked(SampleRequest((0,), "s", 0), rows, 0, record_routes=True), facts


async def decoding(args: argparse.Namespace) -> dict[str, float]:
    body, asked, facts = long_answer(args.rows, args.layers, args.experts, args.top_k)
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
        await asyncio.to_thread(read_sample, body, asked, facts)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(0.002)
        longest.append(max(pauses))
        pauses.clear()
    done = True
    await ticking
    return {
        "rows": args.rows,
        "megabytes": round(len(body) / 1e6, 2),
        "ms": round(1e3 * statistics.median(times), 2),
        "us_per_row": round(1e6 * statistics.median(times) / args.rows, 2),
        "longest_pause_of_the_loop_ms": round(1e3 * statistics.median(longest), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response at most")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of a group")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8192, help="of the answer that is decoded")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "model", seed=0)
        rounds = asyncio.run(rounds_of(args, checkpoint, Path(folder)))

    def medians(of: str) -> dict[str, float]:
        return {kind: round(statistics.median(getattr(r, of) for r in found)) for kind, found in rounds.items()}

    def ratio(kind: str, to: str, of: str) -> float:
        pairs = zip(rounds[kind], rounds[to], strict=True)
        return round(statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs), 3)

    report = {
        "shape": vars(args),
        **{of: medians(of) for of in ("tokens_per_s", "cpu_us_per_token", "bytes_per_sample")},
        "ratios": {
            f"{kind} over {to}": {of: ratio(kind, to, of) for of in ("tokens_per_s", "cpu_us_per_token")}
            for kind, to in (("each", "none"), ("shared", "none"), ("shared", "each"))
        },
        "decoding": asyncio.run(decoding(args)),
    }
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
