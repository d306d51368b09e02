"""Training state of a run, and the checks before resuming."""

from __future__ import annotations

import json
import os

import pytest

from roll_r3.errors import CheckpointError, ConfigError
from roll_r3.saving.state import (
    STATE,
    Data,
    RunState,
    SectionDraws,
    check_resumable,
    fingerprint,
    read_state,
)

DATA = Data(prompts=100, sha256="a" * 64, seed=42, drawn=((3, 16), (1, 8)))
RUN = RunState(step=4, samples_seen=448, trainer="megatron_train", data=DATA)


def test_a_state_is_read_as_written(tmp_path):
    (tmp_path / STATE).write_text(RUN.text())
    assert read_state(tmp_path) == RUN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        RUN.text().replace('"step": 4', '"step": "4"'),
        RUN.text()[:-9],
        RUN.text().replace('"format": 1', '"format": 2'),
        RUN.text().replace('"step": 4', '"step": 4, "more": 1'),
    ],
)
def test_an_invalid_state_is_rejected(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match="is not a valid training state"):
        read_state(tmp_path)


def test_a_missing_state_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_state(tmp_path)


def test_a_run_resumes_with_its_trainer_data_and_seed():
    check_resumable(RUN, trainer="megatron_train", data=DATA.model_copy(update={"drawn": ()}))
    with pytest.raises(ConfigError) as refused:
        check_resumable(RUN, trainer="fsdp2_train", data=Data(prompts=99, sha256="b" * 64, seed=7, drawn=()))
    for reason in ("written by megatron_train", "100 prompts, now 99", "seed 42, not 7: write seed: 42"):
        assert reason in str(refused.value)
    with pytest.raises(ConfigError, match="other data"):
        check_resumable(RUN, trainer="megatron_train", data=DATA.model_copy(update={"sha256": "b" * 64}))


def test_a_fingerprint_tells_rows_and_their_order_apart():
    rows = [((1, 2), "3", "default"), ((1,), "2", "default")]
    assert fingerprint(rows) == fingerprint(list(rows))
    others = [rows[::-1], rows[:1], [((1,), "2", "x"), rows[1]], [((1, 2), "3", "default"), ((1,), "2x", "default")]]
    assert len({fingerprint(other) for other in [rows, *others]}) == 5


def test_as_many_batches_were_drawn_as_there_were_steps(tmp_path):
    """Forged numbers could make drawing them again endless."""
    (tmp_path / STATE).write_text(RUN.text().replace("16", str(10**18)).replace("3,", f"{10**18},"))
    with pytest.raises(CheckpointError, match="batches were drawn in 4 steps"):
        read_state(tmp_path)


def test_too_many_drawn_prompts_are_rejected(tmp_path):
    """Batches of this size would not fit into memory."""
    (tmp_path / STATE).write_text(RUN.text().replace("16", str(1 << 40)))
    with pytest.raises(CheckpointError, match="3298534883336 prompts were drawn, more than the maximum of 4294967296"):
        read_state(tmp_path)


@pytest.mark.timeout(10)
def test_a_pipe_is_rejected_at_once(tmp_path):
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_state(tmp_path)


def test_a_message_is_short(tmp_path):
    (tmp_path / STATE).write_text('{"x' + '": 1, "x'.join(map(str, range(5000))) + '": 1}')
    with pytest.raises(CheckpointError) as refused:
        read_state(tmp_path)
    assert len(str(refused.value)) < 2000


def test_a_state_of_an_earlier_release_is_read(tmp_path):
    old = json.loads(RUN.text())
    del old["data"]["sections"], old["data"]["returned"]
    (tmp_path / STATE).write_text(json.dumps(old))
    assert read_state(tmp_path) == RUN


SECTION = SectionDraws(prompts=40, drawn=((4, 3),))


def test_places_in_sections_and_returned_prompts_are_kept(tmp_path):
    run = RUN.model_copy(update={"data": DATA.model_copy(update={"sections": {"a": SECTION}, "returned": (7, 99)})})
    (tmp_path / STATE).write_text(run.text())
    assert read_state(tmp_path) == run
    forgeries = (("[4, 3]", "[5, 3]", "5 batches were drawn in 4"), ("99", "100", "prompt 100 of 100"))
    for given, forged, message in forgeries:
        (tmp_path / STATE).write_text(json.dumps(json.loads(run.text())).replace(given, forged))
        with pytest.raises(CheckpointError, match=message):
            read_state(tmp_path)


def test_a_section_with_other_prompts_is_refused():
    run = RUN.model_copy(update={"data": DATA.model_copy(update={"sections": {"a": SECTION}})})
    others = {"a": SectionDraws(prompts=41, drawn=()), "b": SectionDraws(prompts=59, drawn=())}
    with pytest.raises(ConfigError, match="section a of rewards had 40 prompts, now 41"):
        check_resumable(run, trainer="megatron_train", data=DATA.model_copy(update={"sections": others}))
