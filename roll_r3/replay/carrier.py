"""From host memory to the device, beside what the device computes."""

from __future__ import annotations

import torch


class Carrier:
    """On a GPU: copies from pinned memory on a stream of their own, which the stream of the model waits for.

    Neither the host nor the kernels that were queued before wait for a copy, so the rows of one micro-batch travel
    while the one before is computed. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory to fill and then to carry."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def carry(self, host: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, for kernels of the current stream. The host's must not be written to again."""
        if self._stream is None:
            return host.to(self.device)
        with torch.cuda.stream(self._stream):
            carried = host.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        carried.record_stream(current)
        return carried
