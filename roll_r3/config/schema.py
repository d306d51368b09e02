"""Generator of roll_r3/config/schema.json, for completion and checks of a YAML file in editors.

python -m roll_r3.config.schema [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from roll_r3.config import generated
from roll_r3.config.pipeline import RLVRConfig

OUTPUT = Path("roll_r3/config/schema.json")
INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
"""Schema of an interpolation, accepted in place of any value."""


def render_schema() -> str:
    """Return the content of the file."""
    schema = _for_editors(RLVRConfig.model_json_schema())
    return json.dumps({"$schema": GenerateJsonSchema.schema_dialect, "title": "roll_r3", **schema}, indent=1) + "\n"


def _for_editors(node: Any) -> Any:
    """Return `node` without titles (they repeat field names), and with interpolation in place of any value."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _for_editors(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
    if "oneOf" in kept:  # an interpolated name fits several
        kept["anyOf"] = kept.pop("oneOf")
    if "properties" in kept:
        kept["properties"] = {name: _or_interpolation(field) for name, field in kept["properties"].items()}
    return kept


def _or_interpolation(field: dict[str, Any]) -> dict[str, Any]:
    """Return `field` with `${section.field}` as an alternative; its description and default stay outside."""
    outside: dict[str, Any] = {key: field[key] for key in ("description", "default") if key in field}
    inside = {key: value for key, value in field.items() if key not in outside}
    if inside.get("type") == "string" and "pattern" not in inside and "enum" not in inside:
        return field
    choices = inside["anyOf"] if list(inside) == ["anyOf"] else [inside]
    return {"anyOf": [*choices, INTERPOLATION], **outside}


if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, render_schema))
