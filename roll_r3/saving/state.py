"""Training state of the driver, saved beside the trainer's tensors for resuming a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from roll_r3.config.findings.readable import readable
from roll_r3.config.reading.disk import read_at_most
from roll_r3.errors import CheckpointError, ConfigError

STATE = "state.json"
TRAINER, CONFIG, METRICS = "trainer", "config.yaml", "metrics.jsonl"
"""Other entries of a checkpoint: the trainer's tensors, the resolved configuration, the metrics of all steps so far."""
_MAX_BYTES = 16 << 20
_MAX_DRAWN = 1 << 32
"""Maximum number of prompts drawn by a run: months at a thousand per second."""


NonNegativeInt = Annotated[int, Field(ge=0, lt=1 << 63)]
PositiveInt = Annotated[int, Field(gt=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Draws = tuple[tuple[PositiveInt, PositiveInt], ...]
"""(steps, prompts per step) drawn from an order of prompts. Steps without a prompt are left out."""


class SectionDraws(_Strict):
    """Draws from the order of one section's prompts."""

    prompts: PositiveInt
    """Number of the section's prompts."""
    drawn: Draws


class Data(_Strict):
    """Data of a run, and its place there (`roll_r3.data.draws.Place`)."""

    prompts: PositiveInt
    """Number of prompts in the data."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Fingerprint of all prompts, in the order of reading."""
    seed: NonNegativeInt
    """Seed of the prompts' order."""
    drawn: Draws
    """Draws from the order of all prompts."""
    sections: dict[str, SectionDraws] = {}
    """Draws from the orders of sections of `rewards`."""
    returned: tuple[NonNegativeInt, ...] = ()
    """Numbers of prompts drawn without use, in the order of reading."""


class RunState(_Strict):
    """State of a run after a step.

    It has no random state, as all randomness derives from the seed and the step number, and no statistics of rewards.
    """

    format: Literal[1] = 1
    step: PositiveInt
    """Number of finished steps, equal to the version of the weights."""
    samples_seen: NonNegativeInt
    trainer: str
    """Name of the strategy of the saved tensors."""
    data: Data

    @model_validator(mode="after")
    def _drawn_in_steps(self) -> Self:
        """Check the drawn batches against the steps; forged numbers could make resuming endless."""
        for drawn in (self.data.drawn, *(section.drawn for section in self.data.sections.values())):
            if (batches := sum(count for count, _ in drawn)) > self.step:
                raise ValueError(f"{batches} batches were drawn in {self.step} steps")
            if (prompts := sum(count * size for count, size in drawn)) > _MAX_DRAWN:
                raise ValueError(f"{prompts} prompts were drawn, more than the maximum of {_MAX_DRAWN}")
        if self.data.returned and max(self.data.returned) >= self.data.prompts:
            raise ValueError(f"prompt {max(self.data.returned)} of {self.data.prompts} was returned")
        return self

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_state(checkpoint: Path) -> RunState:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: the state is missing or invalid.
    """
    path = checkpoint / STATE
    try:
        return RunState.model_validate_json(read_at_most(path, _MAX_BYTES))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} is not a valid training state: {readable(error)}") from error


def fingerprint(rows: Sequence[tuple[object, ...]]) -> str:
    """Return the SHA-256 of JSON values, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def check_resumable(state: RunState, *, trainer: str, data: Data) -> None:
    """Check that a run can resume from a checkpoint.

    Args:
        trainer: strategy of this run.
        data: data of this run; its place is ignored, except for the numbers of prompts in sections.

    Raises:
        ConfigError: it cannot; with all reasons.
    """
    problems = []
    if state.trainer != trainer:
        problems.append(
            f"{trainer} cannot read its tensors, written by {state.trainer}: train with {state.trainer}, or start "
            "from its weights (python -m roll_r3.export makes a pretrain of them)"
        )
    if (state.data.prompts, state.data.sha256) != (data.prompts, data.sha256):
        problems.append(
            f"it was trained on other data: {state.data.prompts} prompts, now {data.prompts}, or other tokens, "
            "answers, domains or order. Use the same data, or start from its weights"
        )
    if state.data.seed != data.seed:
        problems.append(
            f"its prompts are ordered by seed {state.data.seed}, not {data.seed}: write seed: {state.data.seed}"
        )
    for name, now in data.sections.items():
        then = state.data.sections.get(name, now)
        if then.prompts != now.prompts:
            problems.append(
                f"section {name} of rewards had {then.prompts} prompts, now {now.prompts}: use the same tag_included, "
                "or start from its weights"
            )
    if problems:
        raise ConfigError(f"cannot resume from step {state.step}: " + "; ".join(problems))
