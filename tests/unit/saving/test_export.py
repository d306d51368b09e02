"""Export for transformers: its content, and errors of writing."""

from __future__ import annotations

import json
import resource

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from roll_r3.config.load import load_text
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.errors import CheckpointError, ConfigError
from roll_r3.export import _on_one_rank, export, main
from roll_r3.models.checkpoint_files import INDEX
from roll_r3.trainers.hf_checkpoint import save_hf


@pytest.fixture
def alone():
    """Process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [10, 4096], ids=["config", "weights"])
def test_a_full_disk_is_a_checkpoint_error(alone, tmp_path, size):
    """A full disk is not a lost worker: a restart would find it full again."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("x" * 100)
    save_file({"weight": torch.zeros(1)}, tmp_path / "source" / "model.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*File too large"):
            save_hf(iter([("weight", torch.zeros(4096))]), tmp_path / "source", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_index_lists_the_weights_not_held_by_the_trainer(alone, tmp_path):
    """The index lists no other form of the weights, and no output layer tied to the embedding."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.9.mtp.weight"]
    save_file({name: torch.zeros(2) for name in names}, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, source / "consolidated.safetensors")
    written = save_hf(iter([("model.embed_tokens.weight", torch.ones(2))]), source, out)
    held = load_file(out / "model-00001-of-00001.safetensors")
    assert sorted(held) == ["model.embed_tokens.weight", "model.layers.9.mtp.weight"]
    assert held["model.embed_tokens.weight"].tolist() == [1, 1]
    assert sorted(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == sorted(held)
    assert written == {path.name: path.stat().st_size for path in out.iterdir()}


def test_links_to_other_directories_are_not_exported(alone, tmp_path, caplog):
    """A link could publish a private file with the model."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (tmp_path / "key").write_text("secret")
    save_file({"theirs": torch.zeros(2)}, tmp_path / "elsewhere.safetensors")
    save_file({"a": torch.zeros(2), "mine": torch.zeros(2)}, source / "one.safetensors")
    (source / "LICENSE").write_text("text")
    links = {"notes\x1b[2J": "../key", "two.safetensors": "../elsewhere.safetensors", "COPYING": "LICENSE"}
    for name, to in links.items():
        (source / name).symlink_to(to)
    files = {"a": "one.safetensors", "mine": "one.safetensors", "theirs": "two.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": files}))
    written = save_hf(iter([("a", torch.ones(2))]), source, out)
    assert sorted(written) == ["COPYING", "LICENSE", "model-00001-of-00001.safetensors", INDEX]
    assert not any(path.is_symlink() for path in out.iterdir())
    assert sorted(load_file(out / "model-00001-of-00001.safetensors")) == ["a", "mine"]
    left = "\n".join(record.getMessage() for record in caplog.records)
    assert "notes\\x1b[2J is a link out of" in left
    assert "two.safetensors is a link out of" in left and "its 1 tensors" in left


@pytest.mark.parametrize(("text", "message"), [("[]", "has no weight_map"), (None, "No such file")])
def test_an_unreadable_source_is_a_checkpoint_error(alone, tmp_path, text, message):
    (tmp_path / INDEX).write_text(text or json.dumps({"weight_map": {"b": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=message):
        save_hf(iter([("a", torch.ones(2))]), tmp_path, tmp_path / "out")


def test_nothing_is_written_into_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="is within the checkpoint"):
        export(tmp_path / "step-00000002", tmp_path / "step-00000002" / "hf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path, capsys):
    options = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cuda"]
    assert main(options) == 2
    assert capsys.readouterr().err == "error: --device cuda: PyTorch finds no GPU; write cpu, or omit the option\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory\n"),
    ],
    ids=["Ctrl-C", "memory", "GPU memory"],
)
def test_the_end_of_an_export_is_reported(tmp_path, capsys, monkeypatch, error, status, message):
    def stopped(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("roll_r3.export.export", stopped)
    assert main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]) == status
    assert capsys.readouterr().err == message


def test_a_run_on_several_domains_can_be_exported():
    shares = "actor_train.data_args={file_name: a, domain: tag, domain_interleave_probs: {one: 0.5, two: 0.5}}"
    rewards = "rewards={one: {reward: math, tag_included: [x]}, two: {reward: math}}"
    config = load_text(MINIMAL, "config.yaml", [shares, rewards]).config
    assert not check_rules(_on_one_rank(config, None))
