"""docs/configuration.md and the schema for editors agree with the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from roll_r3.config import docs, generated, schema
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.field_paths import annotations_at, fields_at, is_section, members
from roll_r3.config.rules.example import MINIMAL

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("module", [docs, schema], ids=lambda module: module.__name__)
def test_what_is_generated_is_fresh(module):
    render = module.render_docs if module is docs else module.render_schema
    assert (ROOT / module.OUTPUT).read_text() == render(), "run make docs"


def test_a_stale_file_is_noticed(tmp_path, capsys):
    page = tmp_path / "page.md"
    check = ["--check", "--output", str(page)]
    assert generated.main(page, lambda: "text", check) == 1
    assert generated.main(page, lambda: "text", ["--output", str(page)]) == 0
    assert generated.main(page, lambda: "text", check) == 0
    assert generated.main(page, lambda: "other", check) == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["", "actor_train", "actor_train.training_args", "actor_infer.strategy_args"])
def test_every_field_is_described(section):
    page = docs.render_docs()
    for name in fields_at(section):
        items = [line for line in page.splitlines() if line.startswith(f"- `{name}` (")]
        assert items
        assert all(item.partition("): ")[2] for item in items)


UNITS = (
    "bytes", "checkpoints", "chunks", "devices", "engines", "epochs", "experts", "layers", "mib", "micro-batch",
    "optimizer step", "passes", "prompts", "ranks", "requests", "responses", "samples", "seconds", "stages", "steps",
    "tokens",
)  # fmt: skip
PURE_NUMBERS = {
    "seed", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "learning_rate", "max_grad_norm", "temperature",
    "top_p", "pg_clip", "pg_clip_low", "pg_clip_high", "dual_clip_loss", "advantage_clip", "entropy_loss_coef",
    "kl_loss_coef", "init_kl_coef", "is_cap", "is_floor", "mem_fraction_static", "gpu_memory_utilization",
    "moe_aux_loss_coeff", "moe_router_bias_update_rate",
    "difficulty_low_threshold", "difficulty_high_threshold", "low", "high", "penalty_factor", "reward_scale",
    "reward_shift", "tis_lower_bound", "tis_upper_bound", "kimi15_tau", "dppo_max_ratio",
    "max_recoveries", "max_restarts", "max_retries", "kwargs", "server_args",
}  # fmt: skip
"""Fields without a unit: ratios, weights, counts of themselves."""


def every_field(path: str = "") -> Iterator[str]:
    for name in fields_at(path):
        inner = f"{path}.{name}" if path else name
        yield inner
        yield from every_field(inner)


def described(path: str) -> tuple[str, set[Any]]:
    """Return (description, types) of a field."""
    section, _, name = path.rpartition(".")
    models = [m for a in annotations_at(section) for m in members(a) if is_section(m)]
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    return fields[0].description or "", {kind for field in fields for kind in members(field.annotation)}


@pytest.mark.parametrize("path", sorted(set(every_field())))
def test_every_field_has_a_description_and_a_unit(path):
    description, kinds = described(path)
    assert description
    if kinds & {int, float} and path.rpartition(".")[2] not in PURE_NUMBERS:
        assert any(unit in description.lower() for unit in UNITS), description


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    content = json.loads((ROOT / schema.OUTPUT).read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.name)
def test_an_editor_accepts_the_shipped_configurations(editor, file):
    assert list(editor.iter_errors(yaml.safe_load(file.read_text()))) == []
    named = file.read_text().splitlines()[0].partition("$schema=")[2]
    assert (file.parent / named).resolve() == ROOT / schema.OUTPUT, "the first line names the schema"


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("max_steps", 3, True),
        ("max_steps", "${rollout_batch_size}", True),
        ("max_steps", "three", False),
        ("max_steps", 0, False),
        ("sead", 3, False),
        ("actor_train.device_mapping", "list(range(0,8))", True),
        ("actor_train.device_mapping", 3, True),
        ("actor_train.device_mapping", [0, -1], False),
        ("actor_train.router_replay", {"mode": False}, True),
        ("actor_train.router_replay", {"mode": "R4"}, False),
        ("actor_train.router_replay", "${actor_infer.router_replay}", True),
        ("actor_train.router_reply", {"mode": "R3"}, False),
        ("reference", None, True),
    ],
)
def test_an_editor_accepts_and_refuses_what_the_program_does(editor, path, value, accepted):
    content = yaml.safe_load(MINIMAL)
    *above, last = path.split(".")
    node = content
    for key in above:
        node = node[key]
    node[last] = value
    assert (list(editor.iter_errors(content)) == []) == accepted


def test_the_schema_describes_every_field():
    content = json.loads(schema.render_schema())
    models = [content, *content["$defs"].values()]
    assert {model.get("description") is not None for model in models} == {True}
    assert all("description" in field for model in models for field in model["properties"].values())
    assert set(content["properties"]) == set(RLVRConfig.model_fields)
