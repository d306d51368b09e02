"""Copies from host memory to the device, overlapped with the device's computation."""

from __future__ import annotations

import torch


class Carrier:
    """Copies from pinned memory on a separate stream; the stream of the model waits for it.

    Neither the host nor kernels queued earlier wait for a copy: the rows of one micro-batch travel during the
    computation of the previous one. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory to fill, for a later `carry`."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def carry(self, host: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device, for kernels of the current stream. Do not write to the host tensor again."""
        if self._stream is None:
            return host.to(self.device)
        with torch.cuda.stream(self._stream):
            carried = host.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        carried.record_stream(current)
        return carried
