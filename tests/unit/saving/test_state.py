"""What the driver keeps of a run, and what cannot go on from it."""

from __future__ import annotations

import os

import pytest

from roll_r3.errors import CheckpointError, ConfigError
from roll_r3.saving.state import STATE, Data, RunState, check_goes_on, fingerprint, read_state

DATA = Data(prompts=100, sha256="a" * 64, seed=42, drawn=((3, 16), (1, 8)))
RUN = RunState(step=4, samples_seen=448, trainer="megatron_train", data=DATA)


def test_it_is_read_as_it_was_written(tmp_path):
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
def test_nothing_else_is_read(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match="does not say how far the run was"):
        read_state(tmp_path)


def test_no_file_says_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_state(tmp_path)


def test_a_run_goes_on_with_its_trainer_its_data_and_its_seed():
    check_goes_on(RUN, trainer="megatron_train", data=DATA.model_copy(update={"drawn": ()}))
    with pytest.raises(ConfigError) as refused:
        check_goes_on(RUN, trainer="fsdp2_train", data=Data(prompts=99, sha256="b" * 64, seed=7, drawn=()))
    for reason in ("megatron_train's", "of 100 prompts, now of 99", "seed 42, not 7: write seed: 42"):
        assert reason in str(refused.value)
    with pytest.raises(ConfigError, match="other data"):
        check_goes_on(RUN, trainer="megatron_train", data=DATA.model_copy(update={"sha256": "b" * 64}))


def test_a_fingerprint_tells_rows_and_their_order_apart():
    rows = [((1, 2), "3", "default"), ((1,), "2", "default")]
    assert fingerprint(rows) == fingerprint(list(rows))
    others = [rows[::-1], rows[:1], [((1,), "2", "x"), rows[1]], [((1, 2), "3", "default"), ((1,), "2x", "default")]]
    assert len({fingerprint(other) for other in [rows, *others]}) == 5


def test_as_many_batches_were_drawn_as_there_were_steps(tmp_path):
    """Drawing them again takes as long as somebody wrote there."""
    (tmp_path / STATE).write_text(RUN.text().replace("16", str(10**18)).replace("3,", f"{10**18},"))
    with pytest.raises(CheckpointError, match="batches were drawn in 4 steps"):
        read_state(tmp_path)


def test_no_more_was_drawn_than_a_run_can_draw(tmp_path):
    """Those few batches would not fit into memory."""
    (tmp_path / STATE).write_text(RUN.text().replace("16", str(1 << 40)))
    with pytest.raises(CheckpointError, match="3298534883336 prompts were drawn, more than the 4294967296"):
        read_state(tmp_path)


@pytest.mark.timeout(10)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_state(tmp_path)


def test_a_message_is_short(tmp_path):
    (tmp_path / STATE).write_text('{"x' + '": 1, "x'.join(map(str, range(5000))) + '": 1}')
    with pytest.raises(CheckpointError) as refused:
        read_state(tmp_path)
    assert len(str(refused.value)) < 2000
