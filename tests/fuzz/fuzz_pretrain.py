"""Hostile directories of a pretrained model: config.json, the index of its files, and links."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fuzz_harness import HOSTILE, Verdict, Wrong, mutated, replanted
from fuzz_yaml import call, check_said
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from roll_r3.config.rules.example import MINIMAL
from roll_r3.errors import CheckpointError, ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.checkpoint_files import tensor_files
from roll_r3.models.facts import MAX_EXPERTS, read_facts
from roll_r3.run import main
from roll_r3.trainers.hf_checkpoint import save_hf

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_SIZES = {
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260, "hidden_size": 64,
    "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "max_position_embeddings": 131072,
    "head_dim": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v3": {"n_routed_experts": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 16},
}  # fmt: skip
assert set(MODELS) <= set(ARCHITECTURES)


KINDS = ["good", "config", "config", "config", "bytes", "hostile", "index", "index", "index bytes", "special", "links"]
NAMES = ["../outside", "/etc/passwd", "/dev/zero", "\0", "x" * 5000, "", ".", "..", "\ud800", "\x1b[2J", "link-0"]
LINKS = ["../outside", "../outside.safetensors", "/etc/passwd", "/dev/zero", "tokenizer.json", "..", "link-0", "link-1",
         "../model/model-1.safetensors"]  # fmt: skip
SECRET = "secret"
TENSORS = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}


@st.composite
def _directories(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the files of a directory; a text is a special kind, not a file."""
    name = draw(st.sampled_from(sorted(MODELS)))
    config: Any = {"model_type": name, **_SIZES, **MODELS[name]}
    index: Any = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    kind = draw(st.sampled_from(KINDS))
    if kind == "config":
        config = draw(replanted(config))
    texts = {CONFIG: json.dumps(config, default=lambda _: None).encode(), INDEX: json.dumps(index).encode()}
    if kind == "bytes":
        texts[CONFIG] = draw(mutated(texts[CONFIG]))
    elif kind == "hostile":
        value = draw(HOSTILE)
        texts[CONFIG] = draw(
            st.sampled_from([json.dumps(value).encode(), b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff\xfe"])
        )
    elif kind == "index":
        mapped = {draw(st.sampled_from(["a", "\x1b[2J"])): draw(st.sampled_from(NAMES)), "b": "model-1.safetensors"}
        texts[INDEX] = json.dumps(
            draw(replanted(index) | st.just({"weight_map": mapped})), default=lambda _: None
        ).encode()
    elif kind == "index bytes":
        texts[INDEX] = draw(mutated(texts[INDEX]) | st.just(b"[" * 100_000))
    special = (
        draw(st.sampled_from([CONFIG, INDEX])),
        draw(st.sampled_from(["fifo", "/dev/zero", "directory", "loop"])),
    )
    links = draw(st.lists(st.sampled_from(LINKS), max_size=3)) if kind in ("links", "index") else []
    if kind == "links":
        held = st.sampled_from([*(f"link-{i}" for i in range(len(links))), "model-1.safetensors"])
        texts[INDEX] = json.dumps({"weight_map": {"a": draw(held), "b": draw(held)}}).encode()
    return {"kind": kind, "texts": texts, "special": special if kind == "special" else None, "links": links}


class Pretrain:
    name = "pretrain"

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp())
        self._file = self._root / "config.yaml"
        self._file.write_text(MINIMAL)
        (self._root / "outside").write_text(SECRET)
        save_file({name: tensor + 100 for name, tensor in TENSORS.items()}, self._root / "outside.safetensors")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def inputs(self) -> st.SearchStrategy[Any]:
        return _directories()

    def judge(self, value: dict[str, Any]) -> Verdict:
        folder = self._root / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        save_file(TENSORS, folder / "model-1.safetensors")
        for name, data in value["texts"].items():
            (folder / name).write_bytes(data)
        if value["special"]:
            self._place(folder / value["special"][0], value["special"][1])
        for i, to in enumerate(value["links"]):
            (folder / f"link-{i}").symlink_to(to)
        arguments = ["--config", str(self._file), "--", f"pretrain={folder}"]
        for action in (["--validate-only"], ["--validate-only", "--elsewhere"], ["--plan", "--elsewhere"]):
            status, _, err = call(main, [*arguments[:2], *action, *arguments[2:]])
            check_said(status, err)
            if value["kind"] == "good" and status:
                raise Wrong(f"refused by {' '.join(action)}, and is right: {err[:500]}")
        self._read_index(folder, value["kind"])
        self._export(folder)
        try:
            facts = read_facts(folder)
        except ConfigError as error:
            if value["kind"] == "good":
                raise Wrong(f"refused, and is right: {error}") from error
            return "refused"
        self._check(facts, json.loads(value["texts"][CONFIG]))
        return "taken"

    def _read_index(self, folder: Path, kind: str) -> None:
        """Read the index as a trainer does."""
        try:
            found = tensor_files(folder)
        except ConfigError as error:
            if kind == "good":
                raise Wrong(f"refused, and is right: {error}") from error
            check_said(2, str(error))
            return
        for name in found.values():
            if "/" in name or name in ("", ".", "..") or os.path.dirname(os.path.abspath(folder / name)) != str(folder):
                raise Wrong(f"a tensor is looked for in {name!r}")

    def _export(self, folder: Path) -> None:
        """Export, and check for content from outside the directory."""
        out = self._root / "exported"
        shutil.rmtree(out, ignore_errors=True)
        try:
            save_hf(iter([("c", torch.zeros(2))]), folder, out)
        except CheckpointError as error:
            check_said(2, str(error))
        for path in out.iterdir():
            if path.is_symlink() or SECRET.encode() in path.read_bytes() or b"root:" in path.read_bytes():
                raise Wrong(f"{path.name} comes from elsewhere")
        for file in out.glob("*.safetensors"):
            held = load_file(file)
            if any(tensor.max() > 2 for tensor in held.values()):
                raise Wrong(f"weights from elsewhere: {held}")

    def _check(self, facts: Any, said: dict[str, Any]) -> None:
        """Compare the facts with config.json itself."""
        experts = next(said[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in said)
        for value, most in (
            (said["num_hidden_layers"], 10_000),
            (experts, MAX_EXPERTS),
            (said["num_experts_per_tok"], experts),
            (said["vocab_size"], None),
        ):
            if type(value) is not int or value < 1 or (most is not None and value > most):
                raise Wrong(f"taken with {value!r}")
        layers = facts.moe_layers
        if list(layers) != sorted(set(layers)) or any(not 0 <= i < said["num_hidden_layers"] for i in layers):
            raise Wrong(f"MoE layers {layers}")
        if (facts.num_layers, facts.num_experts, facts.top_k, facts.vocab_size) != (
            said["num_hidden_layers"], experts, said["num_experts_per_tok"], said["vocab_size"],
        ):  # fmt: skip
            raise Wrong("other facts than config.json's")

    def _place(self, path: Path, kind: str) -> None:
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        else:
            path.symlink_to(kind)

    def close(self) -> None:
        dist.destroy_process_group()
        shutil.rmtree(self._root)
