"""Patches for SGLang on machines without a GPU, applied while its modules are imported.

Importing this module installs an import hook; it imports nothing heavy itself. It runs in the server and its child
processes, under SGLang's interpreter, so it needs nothing else. Written for SGLang 0.5.23; missing modules of other
releases are never hooked.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _plain_host_memory(module: Any) -> None:
    """Allocate the buffer of routed experts plainly on a CPU: SGLang registers it with CUDA on every device."""

    def allocate(
        dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any, registration_granularity_bytes: Any = None
    ) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    module.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _absorbed_mla(module: Any) -> None:
    """Use absorbed multi-head latent attention under `torch_native`: the other prefill path needs Triton."""
    module.AttentionBackendRegistry.register("torch_native", lambda attention, batch: module.AttnForwardMethod.MLA)


def _unscaled_rotary_mla(module: Any) -> None:
    """Pass rotary embeddings scaled by 1: latent attention on a CPU supports scaled ones only."""
    original = module.get_rope_cpu

    def get_rope_cpu(
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: int,
        is_neox_style: bool = True,
        rope_scaling: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if rope_scaling is None:
            rope_scaling = {
                "rope_type": "deepseek_yarn",
                "factor": 1.0,
                "original_max_position_embeddings": max_position,
            }
        return original(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, *args, **kwargs)

    module.get_rope_cpu = get_rope_cpu


def _seeded_sampling(module: Any) -> None:
    """Allow seeded sampling with `torch_native`, which attends one sequence at a time."""
    module.add_deterministic_attention_backend_choices(["torch_native"])
    module.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])


def _no_batch_invariant_kernels(module: Any) -> None:
    """Disable the batch-invariant Triton kernels; seeds still decide the samples, up to rounding."""

    def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
        return None

    module.enable_batch_invariant_mode = enable_batch_invariant_mode


_AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    "sglang.srt.mem_cache.pool_host.common": _plain_host_memory,
    "sglang.srt.models.deepseek_common.attention_backend_handler": _absorbed_mla,
    "sglang.srt.layers.rotary_embedding.factory": _unscaled_rotary_mla,
    "sglang.srt.arg_groups.choices": _seeded_sampling,
    "sglang.srt.batch_invariant_ops": _no_batch_invariant_kernels,
}


class _Hook:
    """Meta path finder running each function of `_AFTER_IMPORT` once, right after its module was executed."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER_IMPORT or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _fork_children() -> None:
    """Fork SGLang's scheduler and detokenizer from the server, which has their imports already.

    SGLang requests `spawn`, since a forked process cannot use CUDA. On a CPU each spawned process would only import the
    same packages again, one after the other. No thread pool is started before the fork.
    """
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = fork


_fork_children()
sys.meta_path.insert(0, _Hook())
