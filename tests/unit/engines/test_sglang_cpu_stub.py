"""SGLang on a CPU: the hash behind seeded sampling, against MurmurHash3 on plain integers; forked children."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys

import pytest
import torch

from roll_r3.engines.sglang.server import CPU_PATH

WORD = 0xFFFFFFFF


def murmur3_32(words: list[int]) -> int:
    """Return MurmurHash3 x86 32-bit of little-endian 32-bit words, seed 0, from its public description."""
    state = 0
    for word in words:
        word = word * 0xCC9E2D51 & WORD
        word = (word << 15 | word >> 17) & WORD
        state ^= word * 0x1B873593 & WORD
        state = (state << 13 | state >> 19) & WORD
        state = state * 5 + 0xE6546B64 & WORD
    state ^= 4 * len(words)
    state = (state ^ state >> 16) * 0x85EBCA6B & WORD
    state = (state ^ state >> 13) * 0xC2B2AE35 & WORD
    return state ^ state >> 16


def test_the_reference_is_murmur3() -> None:
    assert murmur3_32([0x64636261]) == 0x43ED676A  # "abcd", a published vector


def test_the_stand_in_computes_the_same() -> None:
    if importlib.util.find_spec("sgl_kernel") is not None:
        pytest.skip("a real sgl_kernel is installed")
    spec = importlib.util.spec_from_file_location("sgl_kernel", CPU_PATH / "sgl_kernel" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)

    draw = random.Random(0)
    seeds = [0, 1, WORD, 1 << 32, (1 << 63) - 1, *(draw.getrandbits(63) for _ in range(20))]
    positions = [draw.getrandbits(20) for _ in seeds]
    columns = torch.arange(50)
    got = torch.ops.sgl_kernel.murmur_hash32_cpu(
        torch.tensor(seeds, dtype=torch.int64).to(torch.uint64), torch.tensor(positions), columns
    )
    assert got.dtype == torch.uint32
    expected = [
        [murmur3_32([seed & WORD, seed >> 32, position, column]) for column in range(50)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert got.tolist() == expected


def test_children_are_forked_where_sglang_asks_for_spawn() -> None:
    """Fork, because a spawned child repeats its parent's imports: two thirds of a server's start."""
    code = (
        "import multiprocessing, roll_r3_sglang_cpu\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "print(multiprocessing.get_start_method())"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=CPU_PATH, capture_output=True, text=True, check=True)
    assert told.stdout == "fork\n"
