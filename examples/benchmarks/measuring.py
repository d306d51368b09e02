"""Tools of all benchmarks: alternating rounds, medians of ratios, peak memory of a call, random routes.

No figure is in bare seconds. The measured call and its baseline alternate in one process, and a figure is the median
over the rounds of their ratio, so that drift of the machine affects both. Seconds are processor time
(`time.process_time`) unless stated otherwise: other programs on the same cores then count little.

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
"""Value in the JSON report."""
Clock = Callable[[], float]
"""Function that runs once and returns its seconds."""

LEAST = 0.005
"""Minimum seconds per round of a call; a shorter call is repeated and averaged."""
POOL = 4096
"""Number of rows of distinct experts in the pool of `random_routes`."""


def timed(call: Callable[[], Any]) -> Clock:
    """Return a clock around the whole of `call`."""

    def clock() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return clock


def in_turn(clocks: Mapping[str, Clock], rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each clock per round, after a warm-up round. Every other round runs in reverse order."""
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
    """Compute the median of `above / below * scale` over the rounds, with its quartiles and the number of rounds.

    Example:
        >>> ratio([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
        {'median': 3.0, 'quartiles': [2.5, 4.0], 'rounds': 3}
    """
    each = [scale * a / b for a, b in zip(above, below, strict=True)]
    low, _, high = np.quantile(each, [0.25, 0.5, 0.75]).tolist()
    return {"median": rounded(statistics.median(each)), "quartiles": [rounded(low), rounded(high)], "rounds": len(each)}


def rounded(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def facts(model: str) -> ModelFacts:
    """Return the facts of a checkpoint on the Hugging Face hub listed in `roll_r3.models.known`."""
    config = known_config(model)
    assert config is not None, model
    return facts_of(config)


def random_routes(rng: np.random.Generator, model: ModelFacts, rows: int) -> RouteArray:
    """Draw rows of distinct experts, uniform over them. [L, R, K]

    They come from a pool of `POOL` rows, so that a million takes seconds.
    """
    pool = routes_of(rng.random((POOL, model.num_experts)).argsort(-1)[:, : model.top_k], model)
    return routes_of(pool[rng.integers(0, POOL, (len(model.moe_layers), rows), dtype=np.int16)], model)


def routes_of(ids_LRK: npt.NDArray[np.integer], model: ModelFacts) -> RouteArray:
    """Convert ids to the type of this model's stored routes."""
    drawn: RouteArray = np.asarray(ids_LRK, route_dtype(model.num_experts))  # type: ignore[assignment]
    return drawn


def random_group(model: ModelFacts, samples: int, shared: int, own: int) -> list[RoutedExperts]:
    """Make samples of one prompt, with numbers of shared rows and own rows."""
    rng = np.random.default_rng(0)
    prompt = random_routes(rng, model, shared)
    return [RoutedExperts(np.concatenate([prompt, random_routes(rng, model, own)], axis=1)) for _ in range(samples)]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a Python process of its own; both are pickled, and errors are raised here.

    Its malloc returns every large array at once when freed, so that `peak_bytes` sees memory in use only.
    """
    with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        return pool.apply(function, args)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the rise of this process's memory above the present during `call`, bytes. Linux only."""
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
    """Describe the machine of the figures in general terms."""
    packages = ("numpy", "torch", "megatron-core", "transformers")
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Flatten without a copy."""
    return array.reshape(-1).view(np.uint8)
