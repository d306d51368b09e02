"""One sample as a stream of tokens: its prompt, sampled tokens, and the tool output between turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.batch.routes import Routes

FinishReason = Literal["stop", "length"]

NOT_SAMPLED = -1
"""Version of a token not sampled by any weights: prompt or tool output."""


@dataclass(frozen=True)
class Turn:
    """One response of the policy within a stream: tokens `start` to `end`, the latter excluded."""

    start: int
    end: int
    finish_reason: FinishReason


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A sample of T tokens. Its inputs are all tokens but the last, so routes and labels have T - 1 rows.

    Shape legend: T tokens; P of them before the first turn, R from there on; S sampled tokens.

    Example:
        >>> t = Trajectory.one_turn("step3/p0/s1", "step3/p0", prompt_ids=[5, 6], response_ids=[7],
        ...                         log_probs=[-0.1], version=3, finish_reason="stop")
        >>> t.token_ids_T.tolist(), t.sampled_T.tolist(), t.versions_T.tolist()
        ([5, 6, 7], [False, False, True], [-1, -1, 3])
    """

    sample_id: str
    """Unique in a run. A retried request keeps it, so no sample is counted twice."""
    group_id: str
    """Samples of one prompt share it."""
    token_ids_T: npt.NDArray[np.int32]
    sampled_T: npt.NDArray[np.bool_]
    """True where the policy sampled the token; False for the prompt and for tool output."""
    log_probs_T: npt.NDArray[np.float32]
    """The engine's log-probability (nats) of each sampled token under the sampling temperature, over its set in `kept`
    if that is there; 0 elsewhere."""
    versions_T: npt.NDArray[np.int32]
    """Weight version behind each sampled token; `NOT_SAMPLED` elsewhere."""
    turns: tuple[Turn, ...]
    """The sampled tokens in order, the end-of-sequence token included when a turn's `finish_reason` is "stop"."""
    routes: Routes | None = None
    """T - 1 rows, or a handle to them; rows of tokens that no engine processed are unknown. None: nothing recorded."""
    kept: KeptTokens | None = None
    """S rows: the tokens that each sampled token was chosen from, itself included. None: the whole vocabulary, or
    nothing recorded."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the arrays, turns and routes describe one stream."""
        num_tokens = len(self.token_ids_T)
        for name, dtype in (("token_ids_T", "int32"), ("sampled_T", "bool")):
            self._check_array(name, dtype, num_tokens)
        for name, dtype in (("log_probs_T", "float32"), ("versions_T", "int32")):
            self._check_array(name, dtype, num_tokens)
        in_turns_T = np.zeros(num_tokens, np.bool_)
        end = 0
        for turn in self.turns:
            if not max(1, end) <= turn.start < turn.end <= num_tokens:
                raise ValueError(
                    f"{self.sample_id}: turns must be ordered parts of tokens 1 to {num_tokens}, got {self.turns}"
                )
            in_turns_T[turn.start : turn.end] = True
            end = turn.end
        if not self.turns or not np.array_equal(in_turns_T, self.sampled_T):
            raise ValueError(f"{self.sample_id}: the sampled tokens must be those of the turns, which are {self.turns}")
        rest_T = ~self.sampled_T
        if self.log_probs_T[rest_T].any() or (self.versions_T[rest_T] != NOT_SAMPLED).any():
            raise ValueError(f"{self.sample_id}: a token that was not sampled has a log-probability or a version")
        if (self.versions_T[self.sampled_T] < 0).any():
            raise ValueError(f"{self.sample_id}: a sampled token has no weight version")
        if self.routes is not None and self.routes.num_rows != num_tokens - 1:
            raise ValueError(
                f"{self.sample_id}: routes must have {num_tokens - 1} rows, one per input, got {self.routes.num_rows}"
            )
        if self.kept is not None and (self.kept.num_rows != self.num_sampled or not self.kept.counts_S.all()):
            raise ValueError(
                f"{self.sample_id}: kept tokens must be {self.num_sampled} non-empty sets, one per sampled token, got "
                f"{int((self.kept.counts_S > 0).sum())}"
            )

    def _check_array(self, name: str, dtype: str, num_tokens: int) -> None:
        array = getattr(self, name)
        if array.dtype != np.dtype(dtype) or array.shape != (num_tokens,):
            raise ValueError(
                f"{self.sample_id}: {name} must be {dtype} [{num_tokens}], got {array.dtype} {list(array.shape)}"
            )

    @classmethod
    def one_turn(
        cls,
        sample_id: str,
        group_id: str,
        *,
        prompt_ids: Sequence[int] | npt.NDArray[np.int32],
        response_ids: Sequence[int] | npt.NDArray[np.int32],
        log_probs: Sequence[float] | npt.NDArray[np.float32],
        version: int,
        finish_reason: FinishReason,
        routes: Routes | None = None,
        kept: KeptTokens | None = None,
    ) -> Self:
        """Return the stream of one response to one prompt, sampled by weights of one version."""
        before, sampled = len(prompt_ids), len(response_ids)
        sampled_T = np.repeat([False, True], [before, sampled])
        return cls(
            sample_id=sample_id,
            group_id=group_id,
            token_ids_T=np.concatenate([np.asarray(prompt_ids, np.int32), np.asarray(response_ids, np.int32)]),
            sampled_T=sampled_T,
            log_probs_T=np.concatenate([np.zeros(before, np.float32), np.asarray(log_probs, np.float32)]),
            versions_T=np.where(sampled_T, np.int32(version), np.int32(NOT_SAMPLED)),
            turns=(Turn(before, before + sampled, finish_reason),),
            routes=routes,
            kept=kept,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_sampled(self) -> int:
        """Number of tokens sampled by the policy, over all turns."""
        return int(self.sampled_T.sum())

    @property
    def kept_inputs(self) -> KeptTokens | None:
        """Kept tokens with a row per input, empty where the next token was not sampled."""
        if self.kept is None:
            return None
        return self.kept.spread(np.flatnonzero(self.sampled_T[1:]), self.num_tokens - 1)

    @property
    def prompt_ids(self) -> npt.NDArray[np.int32]:
        """Tokens before the first turn."""
        return self.token_ids_T[: self.turns[0].start]

    @property
    def response_ids(self) -> npt.NDArray[np.int32]:
        """Tokens from the first turn on: sampled ones, and tool output between turns."""
        return self.token_ids_T[self.turns[0].start :]

    @property
    def log_probs(self) -> npt.NDArray[np.float32]:
        """The engine's log-probabilities of the sampled tokens."""
        return self.log_probs_T[self.sampled_T]

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Weight versions in the stream, oldest first."""
        return tuple(int(version) for version in np.unique(self.versions_T[self.sampled_T]))

    @property
    def finish_reason(self) -> FinishReason:
        """The end of the last turn."""
        return self.turns[-1].finish_reason
