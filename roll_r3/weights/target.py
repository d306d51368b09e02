"""Address of one engine for a trainer with new weights. Picklable, and free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerTarget:
    """One server. It contains the key: send it to the trainer, never to a log."""

    name: str
    """Name for messages, such as "engine 0"."""
    host: str
    port: int
    api_key: str = field(repr=False)
    tp_size: int
    """Number of the engine's ranks in the weight group."""
    dtype: str
    """torch name of the engine's weight precision; tensors are sent in it."""
