"""What a rollout engine hands over for one sampled response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import Routes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One response to one prompt, checked on arrival (see `roll_r3.replay.checks`).

    Shape legend: P prompt tokens, R response tokens; T = P + R.

    Example:
        >>> t = Trajectory("step3/p0/s1", np.array([5, 6], np.int32), np.array([7], np.int32),
        ...                np.array([-0.1], np.float32), "stop", (3,))
        >>> len(t.response_ids_R)
        1
    """

    sample_id: str
    """Unique in a run; a retried request keeps it, so that no sample is counted twice."""
    prompt_ids_P: npt.NDArray[np.int32]
    response_ids_R: npt.NDArray[np.int32]
    """The sampled tokens, the end-of-sequence token included when `finish_reason` is "stop"."""
    log_probs_R: npt.NDArray[np.float32]
    """The engine's log-probability (nats) of each sampled token, under the sampling temperature."""
    finish_reason: FinishReason
    weight_versions: tuple[int, ...]
    """The weight versions that produced the response, oldest first; one entry unless weights changed under it."""
    routes: Routes | None = None
    """T - 1 rows, or a handle to them; None when the rollout does not record."""
