"""Contract of an environment. No pipeline runs one yet.

An episode is a conversation: the environment gives messages or text, the policy answers with text. An environment never
sees tokens. Its caller keeps the stream of tokens (`roll_r3.batch.trajectory`) and only appends to it, so sampled
tokens are never tokenised again. An environment never speaks to an engine either: requests go through the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Messages = Sequence[Mapping[str, Any]]
"""{role, content} messages for the chat template."""


@dataclass(frozen=True)
class Observation:
    """Outcome of `Environment.reset` or `Environment.step`."""

    content: Messages | str
    """New messages for the policy, or text that is appended as it is. Not read when `done`."""
    reward: float = 0.0
    """Reward for the step; the episode's is the sum."""
    done: bool = False
    """True if the episode is over."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Further values for logs and metrics. They must be serialisable as JSON."""


class Environment(Protocol):
    """One episode at a time. Methods are coroutines, so that many episodes run side by side in one event loop."""

    async def reset(self, row: Mapping[str, Any]) -> Observation:
        """Begin an episode.

        Args:
            row: the row of the data that the episode is about. The same row begins the same episode.
        """

    async def step(self, text: str) -> Observation:
        """Take the policy's answer.

        Args:
            text: the response to the last observation, without special tokens.

        Raises:
            RollError: the episode cannot go on through no fault of the policy; its sample is dropped.
        """
