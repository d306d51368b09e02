"""What tells a whole checkpoint from a damaged one, and what a checkpoint cannot talk its reader into."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from roll_r3.errors import CheckpointError
from roll_r3.saving.manifest import MANIFEST, MARKER, file_sum, files_below, seal, verify


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "step"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "a.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "state.json").write_text("{}")
    seal(folder, {name: file_sum(folder / name) for name in files_below(folder)})
    return folder


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """A list of files by someone who knows how it is sealed."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    text = json.dumps(content)
    (folder / MANIFEST).write_text(text)
    (folder / MARKER).write_text(hashlib.sha256(text.encode()).hexdigest())


def test_what_was_sealed_is_whole(sealed):
    verify(sealed)
    assert set(json.loads((sealed / MANIFEST).read_text())["files"]) == {"state.json", "trainer/a.safetensors"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "no marker": (lambda f: (f / MARKER).unlink(), "it was not completed"),
    "empty marker": (lambda f: (f / MARKER).write_text(""), "not the one that the marker seals"),
    "no list": (lambda f: (f / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "cut list": (lambda f: (f / MANIFEST).write_text("{"), "not the one that the marker seals"),
    "a file gone": (lambda f: (f / "trainer" / "a.safetensors").unlink(), "a.safetensors is not there"),
    "a directory gone": (lambda f: shutil.rmtree(f / "trainer"), "a.safetensors is not there"),
    "a file cut": (lambda f: (f / "state.json").write_text("{"), "state.json has 1 bytes, and had 2"),
    "a bit": (lambda f: flip(f / "trainer" / "a.safetensors"), "a.safetensors holds something else"),
    "a file more": (lambda f: (f / "trainer" / "b.safetensors").touch(), "b.safetensors was not there"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen_and_named(name, sealed):
    damage, said = DAMAGE[name]
    damage(sealed)
    with pytest.raises(CheckpointError, match=said):
        verify(sealed)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "trainer/../../outside", "", ".", "a\\b", "trainer//a"])
def test_no_list_names_a_file_outside(name, sealed):
    (sealed.parent / "outside").write_text("secret")
    rewrite(sealed, lambda content: content["files"].update({name: {"size": 6, "sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="no path within the checkpoint"):
        verify(sealed)


def test_no_link_leads_outside(sealed):
    outside = sealed.parent / "outside"
    outside.write_bytes((sealed / "state.json").read_bytes())
    (sealed / "state.json").unlink()
    (sealed / "state.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"state\.json is neither a file nor a directory"):
        verify(sealed)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=2),
        lambda content: content.update(files=["a"]),
        lambda content: content["files"].update(a={"size": True, "sha256": "0" * 64}),
        lambda content: content["files"].update(a={"size": 1, "sha256": "x"}),
        lambda content: content["files"].update(a=None),
        lambda content: content.pop("files"),
    ],
)
def test_a_list_that_is_none_is_refused(change, sealed):
    rewrite(sealed, change)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is no list of files"):
        verify(sealed)


def test_a_message_is_short_and_can_be_shown(sealed):
    names = [f"\x1b[2J{number}" for number in range(5000)]
    rewrite(sealed, lambda content: content["files"].update(dict.fromkeys(names, "x" * 50)))
    with pytest.raises(CheckpointError, match="is no list of files") as refused:
        verify(sealed)
    assert len(str(refused.value)) < 4000 and str(refused.value).isprintable()


@pytest.mark.parametrize("at", ["", "trainer"])
def test_a_name_that_a_terminal_obeys_is_shown_as_it_is_written(at, sealed):
    (sealed / at / "\x1b[2J\n\udcff").touch()
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\n\\udcff was not there") as refused:
        verify(sealed)
    assert str(refused.value).isprintable()
    (sealed / at / "\x1b[2J\n\udcff").unlink()
    (sealed / at / "\x1b[2J").symlink_to("..")
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J is neither") as refused:
        verify(sealed)


def test_what_is_sealed_is_what_is_there(sealed):
    (sealed / MANIFEST).unlink()
    (sealed / MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"trainer/a\.safetensors is missing"):
        seal(sealed, {"state.json": file_sum(sealed / "state.json")})
    assert not (sealed / MARKER).exists()


def test_nothing_there_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="it was not completed"):
        verify(tmp_path / "nowhere")


def test_directories_without_end_are_refused(sealed):
    folder = sealed
    for _ in range(100):
        folder = folder / "d"
        folder.mkdir()
    with pytest.raises(CheckpointError, match="directories deep"):
        verify(sealed)


def test_of_a_marker_little_is_read(sealed):
    with (sealed / MARKER).open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match="more than"):
        verify(sealed)
