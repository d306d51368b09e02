"""What SGLang lacks on a machine without a GPU, put in place while its modules are imported.

Importing this module installs an import hook; it imports nothing heavy itself. It runs in the server process and in
each process that the server spawns, under the interpreter that has SGLang, so it needs nothing but that. Written for
SGLang 0.5.23; a module that a release does not have is never hooked.
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
    """The buffer of routed experts is registered with CUDA whatever the device: on a CPU, allocate it plainly."""

    def allocate(
        dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any, registration_granularity_bytes: Any = None
    ) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    module.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _absorbed_mla(module: Any) -> None:
    """Multi-head latent attention under `torch_native`: its other prefill path needs a Triton kernel."""
    module.AttentionBackendRegistry.register("torch_native", lambda attention, batch: module.AttnForwardMethod.MLA)


def _unscaled_rotary_mla(module: Any) -> None:
    """On a CPU latent attention takes scaled rotary embeddings only: scaled by 1 they are the plain ones."""
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
    """`torch_native` attends one sequence at a time, so it may serve where seeds decide the samples."""
    module.add_deterministic_attention_backend_choices(["torch_native"])
    module.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])


def _no_batch_invariant_kernels(module: Any) -> None:
    """The batch-invariant kernels are Triton; without them seeds still decide the samples, up to rounding."""

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
    """A meta path finder that runs a function of `_AFTER_IMPORT` once, right after its module was executed."""

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
    """Fork SGLang's scheduler and detokenizer from the server, which has imported what they need.

    SGLang asks for `spawn`, since a forked process cannot use CUDA. On a CPU each spawned process only imports the same
    packages again, one after the other. Nothing has started a thread pool before they are forked.
    """
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = fork


_fork_children()
sys.meta_path.insert(0, _Hook())
