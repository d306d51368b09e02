"""What all benchmarks share: rounds in turn, medians of ratios, the highest memory of a call, routes to measure with.

Nothing is reported in bare seconds. What is measured and what it is held against run in turn in one process, and a
figure is the median over the rounds of their ratio, so a machine that drifts moves both. Seconds are the processor's
(`time.process_time`) unless said otherwise: other programs on the same cores then count little.

Shape legend: L layers, R rows (tokens), E experts, K experts per token.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RouteArray, RoutedExperts, route_dtype
from roll_r3.models.facts import ModelFacts, facts_of
from roll_r3.models.known import known_config

Report = dict[str, Any]
"""What goes into the JSON."""
Clock = Callable[[], float]
"""Does a thing once; the seconds that it took."""

LEAST = 0.005
"""Seconds that one round of one call takes at least; a shorter call is repeated, and its mean is the round's figure."""
POOL = 4096
"""Rows of distinct experts that `random_routes` draws from."""


def timed(call: Callable[[], Any]) -> Clock:
    """A clock around the whole of `call`."""

    def clock() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return clock


def in_turn(clocks: Mapping[str, Clock], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, after one round that warms up. Every other round runs them backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            taken = _mean(clocks[name])
            if number:
                seconds[name].append(taken)
    return seconds


def _mean(clock: Clock) -> float:
    total, calls = 0.0, 0
    while total < LEAST:
        total += clock()
        calls += 1
    return total / calls


def ratio(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> Report:
    """The median over the rounds of `above / below * scale`, the quartiles around it, and how many rounds there were.

    Example:
        >>> ratio([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
        {'median': 3.0, 'quartiles': [2.5, 4.0], 'rounds': 3}
    """
    each = [scale * a / b for a, b in zip(above, below, strict=True)]
    low, _, high = np.quantile(each, [0.25, 0.5, 0.75]).tolist()
    return {"median": rounded(statistics.median(each)), "quartiles": [rounded(low), rounded(high)], "rounds": len(each)}


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def facts(model: str) -> ModelFacts:
    """Of a checkpoint on the Hugging Face hub that `roll_r3.models.known` lists."""
    config = known_config(model)
    assert config is not None, model
    return facts_of(config)


def random_routes(rng: np.random.Generator, model: ModelFacts, rows: int) -> RouteArray:
    """Rows of distinct experts, uniform over them. [L, R, K]

    They are drawn from `POOL` different rows, so that a million of them take seconds.
    """
    pool = routes_of(rng.random((POOL, model.num_experts)).argsort(-1)[:, : model.top_k], model)
    return routes_of(pool[rng.integers(0, POOL, (len(model.moe_layers), rows), dtype=np.int16)], model)


def routes_of(ids_LRK: npt.NDArray[np.integer], model: ModelFacts) -> RouteArray:
    """The same ids in the type in which routes of this model are kept."""
    drawn: RouteArray = np.asarray(ids_LRK, route_dtype(model.num_experts))  # type: ignore[assignment]
    return drawn


def random_group(model: ModelFacts, samples: int, shared: int, own: int) -> list[RoutedExperts]:
    """Samples of one prompt: so many rows that they share, and so many of each one's own."""
    rng = np.random.default_rng(0)
    prompt = random_routes(rng, model, shared)
    return [RoutedExperts(np.concatenate([prompt, random_routes(rng, model, own)], axis=1)) for _ in range(samples)]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a Python of its own; both are pickled. What it raises is raised here.

    Its malloc gives every large array back when it is freed, so that `peak_bytes` sees what is held, not what is kept
    for later.
    """
    with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        return pool.apply(function, args)


def peak_bytes(call: Callable[[], Any]) -> int:
    """How far the memory of this process rises above what it is now while `call` runs, in bytes. Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far becomes what is held now
    before = _status_bytes("VmHWM")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(f"/proc/self/status has no {field}")


def machine() -> Report:
    """What the figures depend on, in general terms."""
    packages = ("numpy", "torch", "megatron-core", "transformers")
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The same memory, flat."""
    return array.reshape(-1).view(np.uint8)
