"""How a trainer reaches one engine with new weights. Picklable, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerTarget:
    """One server. Carries its key: send it to the trainer, never to a log."""

    name: str
    """For messages: "engine 0"."""
    host: str
    port: int
    api_key: str = field(repr=False)
    tp_size: int
    """Ranks that the engine brings to the weight group."""
    dtype: str
    """torch name of the engine's weight precision: tensors are sent in it."""
