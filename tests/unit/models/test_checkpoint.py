"""Files of a checkpoint, with damaged indexes and links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_r3.errors import ConfigError
from roll_r3.models.checkpoint_files import INDEX, own_file, tensor_files
from roll_r3.preflight.model_files import incomplete


def with_index(folder: Path, text: str | bytes) -> Path:
    (folder / "tokenizer.json").write_text("{}")
    (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_the_index_maps_tensors_to_files(tmp_path):
    files = {"a": "model-1.safetensors", "b": "..safetensors"}
    assert tensor_files(with_index(tmp_path, json.dumps({"weight_map": files}))) == files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ("[" * 100_000, "cannot be read"),
        ("{", "cannot be read"),
        (b"\xff", "cannot be read"),
        ("1" * 5000, "cannot be read"),
    ],
)
def test_an_invalid_index_is_refused_by_check_and_reader(tmp_path, text, said):
    folder = with_index(tmp_path, text)
    with pytest.raises(ConfigError, match=said):
        tensor_files(folder)
    assert said in incomplete(str(folder))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a/", "a\0b", "\ud800", "\x1b[2J", 3, None]
)
def test_an_index_names_files_beside_it(tmp_path, name):
    folder = with_index(tmp_path, json.dumps({"weight_map": {"\x1b[2J": name}}))
    with pytest.raises(ConfigError, match="must be a name in this directory") as refused:
        tensor_files(folder)
    assert str(refused.value).isprintable()
    assert incomplete(str(folder)) == str(refused.value)


def test_a_large_index_is_refused(tmp_path):
    folder = with_index(tmp_path, "{}")
    with (folder / INDEX).open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(ConfigError, match="more than"):
        tensor_files(folder)


def test_a_link_is_followed_within_the_checkpoint_and_to_the_blobs_of_its_repository(tmp_path):
    repository = tmp_path / "models--owner--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    for path in (tmp_path / "outside", blobs / "b", repository / "refs" / "r", snapshot / "here"):
        path.write_text("x")
    (blobs / "out").symlink_to(tmp_path / "outside")
    links = {"blob": "../../blobs/b", "inside": "here", "ref": "../../refs/r", "up": "../../../outside", "far": "/etc"}
    links["through a blob"] = "../../blobs/out"
    for name, to in links.items():
        (snapshot / name).symlink_to(to)
    found = {name: own_file(snapshot, name) for name in [*links, "here", "nothing"]}
    assert {name for name, path in found.items() if path} == {"blob", "inside", "here", "nothing"}
    assert found["blob"] == (blobs / "b").resolve()
    (tmp_path / "other").symlink_to(snapshot)
    assert own_file(tmp_path / "other", "blob") == found["blob"], "the directory itself may be a link"
    moved = repository.rename(tmp_path / "a copy of it")
    assert own_file(moved / "snapshots" / "abc", "blob") is None
