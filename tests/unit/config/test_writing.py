"""Messages about failed writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from roll_r3.config.findings.write_errors import explain, with_filename

FULL = Path("/dev/full")
"""A device without space: every write to it fails as on a full disk."""


@pytest.mark.skipif(not FULL.exists(), reason="this system has none")
def test_a_write_that_names_no_file_gets_its_name() -> None:
    with pytest.raises(OSError, match="No space") as plain, FULL.open("w") as stream:
        stream.write("x")
    assert plain.value.filename is None, "else this is of no use"
    with (
        pytest.raises(OSError, match=r"No space left on device: '/dev/full'"),
        with_filename(FULL),
        FULL.open("w") as stream,
    ):
        stream.write("x")
    with pytest.raises(FileNotFoundError, match="'/no/such'"), with_filename(FULL), Path("/no/such").open():
        pass


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "Free space on the disk"),
        (errno.EROFS, "mounted for writing"),
        (errno.EACCES, f"Let user {os.getuid()} write there"),
    ],
)
def test_what_to_do_comes_with_the_disk(tmp_path: Path, number: int, todo: str) -> None:
    path = tmp_path / "not" / "made" / "metrics.jsonl"
    said = explain(OSError(number, os.strerror(number), str(path)))
    first, second = said.splitlines()
    assert str(path) in first
    assert todo in second
    assert " MB are free)" in second
    assert "resume_from_checkpoint: auto" in second


def test_other_failures_are_said_as_they_are() -> None:
    assert explain(OSError(errno.EIO, "Input/output error", "x")) == "[Errno 5] Input/output error: 'x'"
    assert explain(OSError("in words")) == "in words"
