"""roll_r3/config/schema.json, by which editors complete and check a YAML file; generated from the models.

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
"""What may stand for a value of any type."""


def render_schema() -> str:
    """The whole file."""
    schema = _for_editors(RLVRConfig.model_json_schema())
    return json.dumps({"$schema": GenerateJsonSchema.schema_dialect, "title": "roll_r3", **schema}, indent=1) + "\n"


def _for_editors(node: Any) -> Any:
    """`node` without the titles that repeat field names, and with interpolation wherever a value may stand."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _for_editors(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
    if "oneOf" in kept:  # what stands for a name fits several
        kept["anyOf"] = kept.pop("oneOf")
    if "properties" in kept:
        kept["properties"] = {name: _or_interpolation(field) for name, field in kept["properties"].items()}
    return kept


def _or_interpolation(field: dict[str, Any]) -> dict[str, Any]:
    """A field that may be written as `${section.field}` too; its description and default stay outside."""
    outside: dict[str, Any] = {key: field[key] for key in ("description", "default") if key in field}
    inside = {key: value for key, value in field.items() if key not in outside}
    if inside.get("type") == "string" and "pattern" not in inside and "enum" not in inside:
        return field
    choices = inside["anyOf"] if list(inside) == ["anyOf"] else [inside]
    return {"anyOf": [*choices, INTERPOLATION], **outside}


if __name__ == "__main__":
    sys.exit(generated.main(OUTPUT, render_schema))
