"""What the wire form of routes costs and weighs, and what compression would give.

    .venv/bin/python examples/benchmarks/route_wire.py

Prints one JSON object. Speeds are GB of uint8 MoE-only routes a second, the best of the repeats, and `share_of_copy` is
that speed over that of a plain copy, made in turn with it: the machine cancels out. Routes are drawn uniformly over the
experts, and skewed: each layer has a popularity of experts of its own, log-normal, by which each row's are drawn
without return.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.batch import wire
from roll_r3.batch.routes import RoutedExperts, route_dtype

GB = 1e9


def draw(
    rng: np.random.Generator, layers: int, rows: int, experts: int, top_k: int, skew: float
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Distinct experts per row, most popular first as a router would put them. [M, R, K]"""
    out = np.empty((layers, rows, top_k), route_dtype(experts))
    for layer in range(layers):
        popularity = rng.normal(0, skew, experts).astype(np.float32)
        scores = rng.gumbel(size=(rows, experts)).astype(np.float32) + popularity
        best = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
        order = np.take_along_axis(-scores, best, axis=1).argsort(1)
        out[layer] = np.take_along_axis(best, order, axis=1)
    return out


def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The shortest time of each; they run in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def pack_bits(ids: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The lowest `bits` of each id, end to end; eight ids (one row of top-8) become `bits` bytes."""
    words = ids.reshape(-1, 8).astype(np.uint64)
    joined = (words << (np.arange(8, dtype=np.uint64) * np.uint64(bits))).sum(1, dtype=np.uint64)
    return np.ascontiguousarray(joined.view(np.uint8).reshape(-1, 8)[:, :bits])


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    words = np.zeros((len(packed), 8), np.uint8)
    words[:, :bits] = packed
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    return ((words.view(np.uint64) >> shifts) & np.uint64((1 << bits) - 1)).astype(np.uint8)


def entropy(ids_MRK: npt.NDArray[Any], experts: int) -> float:
    """Bits of an id, each layer's frequencies known: what a coder of single ids can reach at best."""
    per_layer = []
    for ids_RK in ids_MRK:
        share = np.bincount(ids_RK.reshape(-1), minlength=experts) / ids_RK.size
        share = share[share > 0]
        per_layer.append(float(-(share * np.log2(share)).sum()))
    return statistics.mean(per_layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8, choices=[8], help="the packed form is measured for 8 alone")
    parser.add_argument("--samples", type=int, default=8, help="of the group")
    parser.add_argument("--prompt", type=int, default=2048, help="rows that all samples share")
    parser.add_argument("--response", type=int, default=7071, help="rows of each sample's own")
    parser.add_argument("--skew", type=float, default=1.5, help="standard deviation of the log of popularity")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.experts > 256:
        parser.error("--experts: at most 256, since the figures are relative to uint8")
    report: dict[str, Any] = {"shape": {k: v for k, v in vars(args).items() if k != "repeats"}}
    rng = np.random.default_rng(0)
    for name, skew in (("uniform", 0.0), ("skewed", args.skew)):
        shape = (args.experts, args.top_k, skew)
        prompt = draw(rng, args.layers, args.prompt, *shape)
        samples = []
        for _ in range(args.samples):
            own = draw(rng, args.layers, args.response, *shape)
            samples.append(RoutedExperts(np.concatenate([prompt, own], axis=1)))
        report[name] = measure(samples, args.experts, args.repeats)
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def measure(samples: list[RoutedExperts], experts: int, repeats: int) -> dict[str, Any]:
    plain = np.concatenate([sample.ids_MRK.reshape(-1) for sample in samples])
    encoded = wire.encode(samples, experts)
    opened = wire.EncodedGroup(encoded)
    stored = encoded[-opened.num_layers * opened.row_bytes * sum(opened.stored_rows) :]
    stage = range(opened.num_layers // 2)
    everyone = range(len(samples))

    def speed(call: Callable[[], Any], nbytes: int) -> dict[str, float]:
        taken, copied = seconds([call, stored.copy], repeats)
        per_second, copy = nbytes / taken, stored.nbytes / copied
        return {"GB_per_s": round(per_second / GB, 3), "share_of_copy": round(per_second / copy, 4)}

    bits = max(1, (experts - 1).bit_length())
    packed = pack_bits(stored, bits)
    assert np.array_equal(unpack_bits(packed, bits).reshape(-1), stored)
    sample_bytes = stored[: 4 << 20]  # zlib is slow
    squeezed = zlib.compress(sample_bytes, 1)
    return {
        "bytes_uint8": plain.nbytes,
        "bytes_needed": stored.nbytes,
        "bytes_encoded": encoded.nbytes,
        "encoded_over_uint8": round(encoded.nbytes / plain.nbytes, 4),
        "encoded_over_needed": round(encoded.nbytes / stored.nbytes, 5),
        "encode": speed(lambda: wire.encode(samples, experts), plain.nbytes),
        "open_us": round(1e6 * seconds([lambda: wire.EncodedGroup(encoded)], repeats)[0], 1),
        "view_of_a_stage_checked": speed(lambda: opened.view(stage, everyone), stored.nbytes // 2),
        "decode": speed(lambda: wire.decode(encoded), plain.nbytes),
        "sums": {
            "crc32": speed(lambda: zlib.crc32(stored), stored.nbytes),
            "adler32": speed(lambda: zlib.adler32(stored), stored.nbytes),
            "sha256": speed(lambda: hashlib.sha256(stored).digest(), stored.nbytes),
            "blake2b": speed(lambda: hashlib.blake2b(stored).digest(), stored.nbytes),
            "largest_id": speed(lambda: stored.max(), stored.nbytes),
        },
        "entropy_over_8_bits": round(entropy(samples[0].ids_MRK, experts) / 8, 4),
        "packed_bits": {
            "size": round(packed.nbytes / stored.nbytes, 4),
            "in": speed(lambda: pack_bits(stored, bits), stored.nbytes),
            "out": speed(lambda: unpack_bits(packed, bits), stored.nbytes),
        },
        "zlib_1": {
            "size": round(len(squeezed) / sample_bytes.nbytes, 4),
            "in": speed(lambda: zlib.compress(sample_bytes, 1), sample_bytes.nbytes),
            "out": speed(lambda: zlib.decompress(squeezed), sample_bytes.nbytes),
        },
    }


if __name__ == "__main__":
    main()
