"""Base of all configuration models."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]
"""Time limit in seconds: at most 30 days, since clocks and timers overflow far beyond."""


class Config(BaseModel):
    """Frozen, strict section of the YAML file. Unknown keys are rejected; docstrings of fields are the docs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
