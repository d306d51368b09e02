"""What the driver needs besides the trainer's tensors to go on with a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from roll_r3.errors import CheckpointError, ConfigError

STATE = "state.json"
TRAINER, CONFIG, METRICS = "trainer", "config.yaml", "metrics.jsonl"
"""What a checkpoint holds besides: the trainer's tensors, the resolved configuration, the metrics of all its steps."""
_MAX_BYTES = 16 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(_Strict):
    """How far the run was in its data."""

    prompts: PositiveInt
    """How many there are."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of all of them, in the order in which they were read."""
    seed: NonNegativeInt
    """What their order was drawn from."""
    drawn: tuple[tuple[PositiveInt, PositiveInt], ...]
    """(batches, prompts of a batch) that were drawn, in this order."""


class RunState(_Strict):
    """Of a run, after a step. There are no statistics of rewards to keep, and no random state: what is random is drawn
    from the seed and the number of the step."""

    format: Literal[1] = 1
    step: PositiveInt
    """Steps done, which is the version of the weights too."""
    samples_seen: NonNegativeInt
    trainer: str
    """Name of the strategy that wrote the tensors."""
    data: Data

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_state(checkpoint: Path) -> RunState:
    """What a checkpoint says of its run.

    Raises:
        CheckpointError: nothing that can be read.
    """
    path = checkpoint / STATE
    try:
        with path.open("rb") as stream:
            return RunState.model_validate_json(stream.read(_MAX_BYTES))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} does not say how far the run was: {error}") from error


def fingerprint(rows: Sequence[tuple[object, ...]]) -> str:
    """SHA-256 of what JSON can say, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def check_goes_on(state: RunState, *, trainer: str, data: Data) -> None:
    """Whether a run can go on from a checkpoint.

    Args:
        trainer: strategy of this run.
        data: of this run; what was drawn does not matter.

    Raises:
        ConfigError: it cannot; with every reason.
    """
    problems = []
    if state.trainer != trainer:
        problems.append(
            f"its tensors are {state.trainer}'s, which {trainer} cannot read: train with {state.trainer}, or start "
            "from its weights (python -m roll_r3.export makes a pretrain of them)"
        )
    if (state.data.prompts, state.data.sha256) != (data.prompts, data.sha256):
        problems.append(
            f"its place is in other data: of {state.data.prompts} prompts, now of {data.prompts} or with other tokens, "
            "answers, domains or order. Give it the data it had, or start from its weights"
        )
    if state.data.seed != data.seed:
        problems.append(
            f"its prompts are in the order of seed {state.data.seed}, not {data.seed}: write seed: {state.data.seed}"
        )
    if problems:
        raise ConfigError(f"the run cannot go on from step {state.step}: " + "; ".join(problems))
