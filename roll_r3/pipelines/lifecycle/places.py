"""Place in the prompts, on its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import asdict

from roll_r3.data.draws import Place, SectionPlace
from roll_r3.saving.state import Data


def placed(data: Data, place: Place) -> Data:
    """Return the data of a run with another place."""
    return Data.model_validate(data.model_dump() | asdict(place))


def place_of(data: Data) -> Place:
    """Return the place of a run in its data."""
    sections = {name: SectionPlace(section.prompts, section.drawn) for name, section in data.sections.items()}
    return Place(data.drawn, sections, data.returned)
