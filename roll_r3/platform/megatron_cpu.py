"""Adapter to run megatron-core without a GPU.

Call `install()` before the first import of megatron, in every thread running it. With CUDA it only fixes megatron's
faults without TransformerEngine. Without CUDA the CPU serves all requests for "cuda": `device="cuda"` becomes the CPU,
streams and events do nothing, and the CUDA generator is the CPU's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_patch_lock = threading.Lock()
_patched = False
_this_thread = threading.local()


def install() -> bool:
    """Make megatron-core importable and runnable here. Cheap to call again, from any thread.

    Returns:
        True if the CPU replaces CUDA, False if CUDA is present.
    """
    global _patched
    if torch.cuda.is_available():
        _fix_without_transformer_engine()
        return False
    with _patch_lock:
        if not _patched:
            _patch_process()
            _patched = True
            logger.info("no CUDA device: megatron-core runs on the CPU")
    if not hasattr(_this_thread, "mode"):
        # a TorchFunctionMode belongs to the thread entering it, and stays until the thread ends
        _this_thread.mode = _CudaMeansCpu()
        _this_thread.mode.__enter__()
    return True


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Mode rewriting the device arguments of torch functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron's optimizers recognise gradients by the string "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Inert:
    """Substitute for a CUDA stream or event: every method returns the object itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Inert) -> float:
        return 0.0


class _OneGenerator(dict[int, torch.Generator]):
    """Substitute for `torch.cuda.default_generators`: the CPU's generator for every index."""

    def __missing__(self, key: int) -> torch.Generator:
        return torch.default_generator


def _idle(result: object = None) -> Callable[..., Any]:
    """Return a new function returning `result`: torch.compile keeps a rule per function."""
    return lambda *args, **kwargs: result


def _patch_process() -> None:
    """Patch the process once, before megatron is imported."""
    # imported by torch.optim; it must see the unpatched torch.cuda
    from torch import _dynamo  # noqa: F401

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _patch_torch_cuda()
    random = _import_without_compiling()
    _fix_without_transformer_engine()

    from megatron.core.transformer.moe import token_dispatcher

    def splits_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # the original converts tensors leaving a GPU only, but the all-to-all always needs numpy splits
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = splits_on_host
    _support_uneven_splits()
    random._lazy_init = _idle()
    random._lazy_call = lambda callback, **kwargs: callback()
    # the CPU and GPU generators are one here, so the warning about a changed CPU state is pointless
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    inert = _Inert()
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _idle())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _idle(0))
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _idle())
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.current_stream, cuda.default_stream = _idle(inert), _idle(inert)
    cuda.Stream = cuda.Event = _Inert
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.default_generators = _OneGenerator()


def _support_uneven_splits() -> None:
    """Gather and reduce-scatter parts of different sizes, unsupported by gloo: pad to the largest."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])

    def gather_parts(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        sizes = [int(size) for size in output_split_sizes] if output_split_sizes is not None else []
        if len(set(sizes)) < 2 or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)  # type: ignore[no-any-return]
        parts = gather(padded(input_, max(sizes)), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_parts(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        sizes = [int(size) for size in input_split_sizes] if input_split_sizes is not None else []
        if len(set(sizes)) < 2 or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)  # type: ignore[no-any-return]
        parts = torch.cat([padded(part, max(sizes)) for part in input_.split(sizes)])
        own: torch.Tensor = reduce_scatter(parts, group)[: sizes[group.rank()]]
        return own

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts


def _import_without_compiling() -> Any:
    """Import megatron with `torch.compile` as the identity: its fusers need a C++ compiler and minutes."""
    original = torch.compile
    torch.compile = lambda function=None, **kwargs: function if function is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        import megatron.core.tensor_parallel.random as random
        import megatron.core.transformer.moe.moe_utils  # noqa: F401
    finally:
        torch.compile = original
    return random


def _fix_without_transformer_engine() -> None:
    """Fix two faults of megatron-core 0.16.1 without TransformerEngine.

    A name read by every MoE router is undefined, and latent attention takes its substitute for the real library.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if find_spec("transformer_engine") is None:
        multi_latent_attention.HAVE_TE = False
