"""What the driver needs besides the trainer's tensors to go on with a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from roll_r3.config.disk import read_at_most
from roll_r3.config.readable import readable
from roll_r3.errors import CheckpointError, ConfigError

STATE = "state.json"
TRAINER, CONFIG, METRICS = "trainer", "config.yaml", "metrics.jsonl"
"""What a checkpoint holds besides: the trainer's tensors, the resolved configuration, the metrics of all its steps."""
_MAX_BYTES = 16 << 20
_MAX_DRAWN = 1 << 32
"""Prompts that a run may have drawn: months at a thousand a second."""


NonNegativeInt = Annotated[int, Field(ge=0, lt=1 << 63)]
PositiveInt = Annotated[int, Field(gt=0, lt=1 << 63)]


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

    @model_validator(mode="after")
    def _drawn_in_steps(self) -> Self:
        """Else what was drawn would be drawn again for as long as somebody wrote there."""
        if (batches := sum(count for count, _ in self.data.drawn)) != self.step:
            raise ValueError(f"{batches} batches were drawn in {self.step} steps")
        if (prompts := sum(count * size for count, size in self.data.drawn)) > _MAX_DRAWN:
            raise ValueError(f"{prompts} prompts were drawn, more than the {_MAX_DRAWN} that a run can draw")
        return self

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_state(checkpoint: Path) -> RunState:
    """What a checkpoint says of its run.

    Raises:
        CheckpointError: nothing that can be read.
    """
    path = checkpoint / STATE
    try:
        return RunState.model_validate_json(read_at_most(path, _MAX_BYTES))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} does not say how far the run was: {readable(error)}") from error


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
