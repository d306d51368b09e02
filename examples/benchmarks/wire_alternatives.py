"""Study of other codings and checksums for the wire form, behind docs/wire_format.md.

    .venv/bin/python -m examples.benchmarks wire_alternatives

A group of Qwen3-30B-A3B's shape. Sizes are of the uint8 rows stored by the format. Times are relative to a plain copy
of the same bytes. Routes are drawn uniformly over the experts, and skewed: each layer has a log-normal popularity of
experts of its own, and each row draws by it without replacement.
"""

from __future__ import annotations

import hashlib
import statistics
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.benchmarks.measuring import Report, facts, in_turn, ratio, rounded, timed
from roll_r3.batch.routes import RouteArray, route_dtype
from roll_r3.models.facts import ModelFacts

MODEL = "Qwen/Qwen3-30B-A3B"
ROWS = 1 << 14
SKEW = 1.5
"""Standard deviation of the logarithm of an expert's popularity."""


def measure(rounds: int) -> Report:
    """Measure all figures."""
    model = facts(MODEL)
    rng = np.random.default_rng(0)
    return {
        "model": MODEL,
        "rows": ROWS,
        "uniform": alternatives(draw(rng, model, ROWS, 0.0), model.num_experts, rounds),
        "skewed": alternatives(draw(rng, model, ROWS, SKEW), model.num_experts, rounds),
    }


def draw(rng: np.random.Generator, model: ModelFacts, rows: int, skew: float) -> RouteArray:
    """Draw distinct experts per row, the most popular first like a router. [L, R, K]"""
    ids_LRK: RouteArray = np.empty((len(model.moe_layers), rows, model.top_k), route_dtype(model.num_experts))
    for ids_RK in ids_LRK:
        popularity_E = rng.normal(0, skew, model.num_experts).astype(np.float32)
        scores_RE = rng.gumbel(size=(rows, model.num_experts)).astype(np.float32) + popularity_E
        ids_RK[:] = (-scores_RE).argsort(1)[:, : model.top_k]
    return ids_LRK


def alternatives(ids_LRK: RouteArray, experts: int, rounds: int) -> Report:
    """Measure sizes over the uint8 rows, and times over a copy of them."""
    bits = max(1, (experts - 1).bit_length())
    packed = pack_bits(ids_LRK, bits)
    assert np.array_equal(unpack_bits(packed, bits).reshape(-1), ids_LRK.reshape(-1))
    squeezed = zlib.compress(ids_LRK.data, 1)
    calls: dict[str, Callable[[], Any]] = {
        "crc32": lambda: zlib.crc32(ids_LRK.data),
        "adler32": lambda: zlib.adler32(ids_LRK.data),
        "sha256": lambda: hashlib.sha256(ids_LRK.data).digest(),
        "blake2b": lambda: hashlib.blake2b(ids_LRK.data).digest(),
        "largest_id": ids_LRK.max,
        "packed_bits_in": lambda: pack_bits(ids_LRK, bits),
        "packed_bits_out": lambda: unpack_bits(packed, bits),
        "zlib_1_in": lambda: zlib.compress(ids_LRK.data, 1),
        "zlib_1_out": lambda: zlib.decompress(squeezed),
    }
    seconds = in_turn({"copy": timed(ids_LRK.copy)} | {name: timed(call) for name, call in calls.items()}, rounds)
    return {
        "size": {
            "least_for_a_coder_of_single_ids": rounded(entropy(ids_LRK, experts) / 8),
            "packed_bits": rounded(packed.nbytes / ids_LRK.nbytes),
            "zlib_1": rounded(len(squeezed) / ids_LRK.nbytes),
        },
        "time_over_copy": {name: ratio(seconds[name], seconds["copy"]) for name in calls},
        "GB_per_s": {name: rounded(ids_LRK.nbytes / statistics.median(each) / 1e9) for name, each in seconds.items()},
    }


def pack_bits(ids: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Pack the lowest `bits` of each id; eight ids (one row of top-8) become `bits` bytes."""
    words = ids.reshape(-1, 8).astype(np.uint64)
    joined = (words << (np.arange(8, dtype=np.uint64) * np.uint64(bits))).sum(1, dtype=np.uint64)
    return np.ascontiguousarray(joined.view(np.uint8).reshape(-1, 8)[:, :bits])


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Unpack. [ids / 8, 8]"""
    words = np.zeros((len(packed), 8), np.uint8)
    words[:, :bits] = packed
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    return ((words.view(np.uint64) >> shifts) & np.uint64((1 << bits) - 1)).astype(np.uint8)


def entropy(ids_LRK: RouteArray, experts: int) -> float:
    """Return the entropy of an id in bits, given each layer's frequencies: the minimum for a coder of single ids."""
    per_layer = []
    for ids_RK in ids_LRK:
        share = np.bincount(ids_RK.reshape(-1), minlength=experts) / ids_RK.size
        share = share[share > 0]
        per_layer.append(float(-(share * np.log2(share)).sum()))
    return statistics.mean(per_layer)
