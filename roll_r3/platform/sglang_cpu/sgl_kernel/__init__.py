"""Substitute for SGLang's kernel package in a server without a GPU.

SGLang imports the names below on a CPU for every model; all serve speculative decoding only. Ordinary generation needs
one operator, the hash of seeded sampling; it is written in PyTorch here. Model operations use SGLang's own PyTorch
paths. This folder is last on the server's path: a real package wins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_WORD = 0xFFFFFFFF


def _missing(name: str) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: speculative decoding needs the real sgl_kernel")

    return call


assign_draft_cache_locs_contiguous_cpu = _missing("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _missing("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = _missing("assign_req_to_token_pool_cpu")
build_tree_kernel_efficient_cpu = _missing("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _missing("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _missing("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _missing("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _missing("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _missing("verify_tree_greedy_cpu")


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    """The low 32 bits of a product of 32-bit words held in int64, in two halves so that int64 never overflows."""
    low, high = factor & 0xFFFF, factor >> 16
    return (value * low + (((value * high) & 0xFFFF) << 16)) & _WORD


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _WORD


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotate(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _WORD


def murmur_hash32(seed_N: torch.Tensor, positions_N: torch.Tensor, columns_V: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column), as SGLang's Triton kernel computes it.

    Args:
        seed_N: uint64, 64-bit seeds.
        positions_N: int, 32 bits used.
        columns_V: int, 32 bits used.

    Returns:
        uint32 [N, V].
    """
    seed = seed_N.view(torch.int64)[:, None]
    state = torch.zeros_like(seed)
    state = _mix(state, seed & _WORD)
    state = _mix(state, (seed >> 32) & _WORD)
    state = _mix(state, positions_N.to(torch.int64)[:, None] & _WORD)
    state = _mix(state, columns_V.to(torch.int64)[None, :] & _WORD)
    state = state ^ 16  # bytes hashed
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
