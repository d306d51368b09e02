"""Manifests: detection of damaged checkpoints, and safe reading of hostile ones."""

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
    """Forge a manifest with a matching marker."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    text = json.dumps(content)
    (folder / MANIFEST).write_text(text)
    (folder / MARKER).write_text(hashlib.sha256(text.encode()).hexdigest())


def test_a_sealed_directory_is_intact(sealed):
    verify(sealed)
    assert set(json.loads((sealed / MANIFEST).read_text())["files"]) == {"state.json", "trainer/a.safetensors"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "no marker": (lambda f: (f / MARKER).unlink(), "it was not completed"),
    "empty marker": (lambda f: (f / MARKER).write_text(""), "does not match the marker"),
    "no list": (lambda f: (f / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "cut list": (lambda f: (f / MANIFEST).write_text("{"), "does not match the marker"),
    "a file gone": (lambda f: (f / "trainer" / "a.safetensors").unlink(), "a.safetensors is missing"),
    "a directory gone": (lambda f: shutil.rmtree(f / "trainer"), "a.safetensors is missing"),
    "a file cut": (lambda f: (f / "state.json").write_text("{"), "state.json has 1 bytes, and had 2"),
    "a bit": (lambda f: flip(f / "trainer" / "a.safetensors"), "a.safetensors does not match its checksum"),
    "a file more": (lambda f: (f / "trainer" / "b.safetensors").touch(), "b.safetensors was not there"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_detected_and_named(name, sealed):
    damage, message = DAMAGE[name]
    damage(sealed)
    with pytest.raises(CheckpointError, match=message):
        verify(sealed)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "trainer/../../outside", "", ".", "a\\b", "trainer//a"])
def test_a_path_outside_is_rejected(name, sealed):
    (sealed.parent / "outside").write_text("secret")
    rewrite(sealed, lambda content: content["files"].update({name: {"size": 6, "sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="not a path within the checkpoint"):
        verify(sealed)


def test_a_link_is_rejected(sealed):
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
def test_an_invalid_manifest_is_rejected(change, sealed):
    rewrite(sealed, change)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not a list of files"):
        verify(sealed)


def test_a_message_is_short_and_printable(sealed):
    names = [f"\x1b[2J{number}" for number in range(5000)]
    rewrite(sealed, lambda content: content["files"].update(dict.fromkeys(names, "x" * 50)))
    with pytest.raises(CheckpointError, match="is not a list of files") as refused:
        verify(sealed)
    assert len(str(refused.value)) < 4000 and str(refused.value).isprintable()


@pytest.mark.parametrize("at", ["", "trainer"])
def test_control_characters_in_names_are_escaped(at, sealed):
    (sealed / at / "\x1b[2J\n\udcff").touch()
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\n\\udcff was not there") as refused:
        verify(sealed)
    assert str(refused.value).isprintable()
    (sealed / at / "\x1b[2J\n\udcff").unlink()
    (sealed / at / "\x1b[2J").symlink_to("..")
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J is neither") as refused:
        verify(sealed)


def test_sums_must_list_the_existing_files(sealed):
    (sealed / MANIFEST).unlink()
    (sealed / MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"trainer/a\.safetensors is missing"):
        seal(sealed, {"state.json": file_sum(sealed / "state.json")})
    assert not (sealed / MARKER).exists()


def test_an_empty_directory_is_incomplete(tmp_path):
    with pytest.raises(CheckpointError, match="it was not completed"):
        verify(tmp_path / "nowhere")


def test_deep_directories_are_rejected(sealed):
    folder = sealed
    for _ in range(100):
        folder = folder / "d"
        folder.mkdir()
    with pytest.raises(CheckpointError, match="directories deep"):
        verify(sealed)


def test_a_large_marker_is_rejected(sealed):
    with (sealed / MARKER).open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match="more than"):
        verify(sealed)
