"""Evaluation beside a whole run: it changes no number of training, and is the same from a checkpoint alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from whole_run import SAMPLED_TO_THE_BIT, Run, few_steps, finished, learned

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS = (*few_steps(3), *SAMPLED_TO_THE_BIT)
EVALUATED = ("eval_steps=2", "save_steps=2")

COPIES = [{"prompt": f"copy {n}:", "ground_truth": f"{n}"} for n in range(100, 110)]


def scores(rows: Sequence[dict[str, float]], step: int) -> dict[str, float]:
    [row] = [row for row in rows if row["step"] == step and "time/step_evaluation" in row]
    return {name: value for name, value in row.items() if name.startswith("val/")}


def test_it_changes_no_number_and_a_checkpoint_alone_gives_the_same(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", examples=addition_mod10(), warm_start_steps=60)
    plain = finished(Run(tmp_path / "plain", checkpoint, *STEPS, "save_steps=2", config="quickstart_engines"))
    (tmp_path / "copies.jsonl").write_text("\n".join(map(json.dumps, COPIES)))
    evaluation = (
        *EVALUATED,
        f"validation={{data_args: {{file_name: ['bundled:addition_mod10_test', {tmp_path}/copies.jsonl]}}, "
        "val_n_sample: 2, generating_args: {temperature: 0.7, max_new_tokens: 6}}",
    )
    run = finished(Run(tmp_path / "evaluated", checkpoint, *STEPS, *evaluation, config="quickstart_engines"))

    steps = [row for row in learned(run) if "system/global_step" in row]
    assert steps == learned(plain), "to the bit"
    evaluated = [row["step"] for row in run.metrics() if "time/step_evaluation" in row]
    assert evaluated == [0, 2, 3]
    rows = [json.loads(line) for line in (run.path / "validation.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) == 3 * (20 + len(COPIES)) * 2
    assert max(row["response_length"] for row in rows) == 6, "its own longest response, above training's"
    summary = run.stdout.read_text()
    assert "evaluation      after step 0 -> after step 3" in summary
    assert "addition_mod10_test/avg@2" in summary

    named = f"resume_from_checkpoint={run.path.resolve() / 'checkpoints' / 'step-00000002'}"
    alone = finished(
        Run(tmp_path / "alone", checkpoint, *STEPS, *evaluation, named, "--eval-only", config="quickstart_engines")
    )
    [folder] = alone.output.glob("*/evaluations/2*")
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [2]
    assert scores(written, 2) == scores(run.metrics(), 2), "to the bit"
    printed = alone.stdout.read_text()
    assert "step-00000002" in printed and "val/copies/pass@2" in printed
    assert not list(alone.output.glob("*/2*")), "no run was made"
