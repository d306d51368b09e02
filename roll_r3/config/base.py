"""What every configuration model shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]
"""To wait for something: a month at most, since clocks and timers overflow far beyond."""


class Config(BaseModel):
    """A frozen, strict section of the YAML file: unknown keys are refused, docstrings under fields are the docs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
