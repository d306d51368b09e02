"""Hostile checkpoints of a run, also with forged seals, and hostile tensors of a trainer.

They are read through the user's entry points, as far as possible without an engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from fuzz_harness import Verdict, Wrong, mutated, replanted
from fuzz_yaml import call, check_said
from hypothesis import strategies as st

from roll_r3 import export, run
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.config.rules.example import MINIMAL
from roll_r3.data.draws import prompt_source
from roll_r3.data.prompts import Prompt
from roll_r3.errors import CheckpointError, ConfigError, RollError
from roll_r3.pipelines.lifecycle import resume
from roll_r3.pipelines.lifecycle.places import place_of
from roll_r3.saving.manifest import file_sum, files_below, seal
from roll_r3.saving.state import CONFIG, METRICS, STATE, TRAINER, Data, RunState
from roll_r3.tracking.metric_log import MetricLog
from roll_r3.tracking.progress import Progress
from roll_r3.trainers import checkpoint

STEP = 4
TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.arange(4.0) + 0.5}
NAMES = [
    "../outside",
    "/etc/passwd",
    "a/../../outside",
    "trainer/../state.json",
    "",
    ".",
    "..",
    "a\0b",
    "a\\b",
    "c:\\x",
    "state.json/x",
]
SPECIAL = ["link", "link out", "link up", "fifo", "socket", "directory", "deep", "extra", "gone", "odd name"]
_DOUBLED = b"a: &a {x: 1}\n" + b"".join(
    b"b%d: &b%d {p: *%s, q: *%s, r: *%s, s: *%s}\n" % (i, i, *[b"b%d" % (i - 1) if i else b"a"] * 4) for i in range(16)
)
CONFIG_LINES = [
    _DOUBLED, b"x: !!python/object/apply:os.mkdir [touched]\n", b"- a\n", b"", b"\xff", b"{" * 3000, b"a: ${a}\n",
    b"null", b'"\\e[2J": 1\n', b'a: {"\\e[2J": 1, b: "\\e[2J"}\n', b'? "\\e[2J"\n: [}\n', b'"\\e[2J": ${a.b}\n',
]  # fmt: skip


def files() -> dict[str, bytes]:
    """Return the files of a good checkpoint."""
    config = RLVRConfig.model_validate(yaml.safe_load(MINIMAL) | {"pretrain": "/nowhere/at/all"})
    state = RunState(
        step=STEP,
        samples_seen=32,
        trainer="megatron_train",
        data=Data(prompts=100, sha256="a" * 64, seed=42, drawn=((STEP, 8),)),
    )
    metrics = "".join(
        json.dumps({"step": step, "actor/lr": 1e-6, "critic/score/mean": None}) + "\n" for step in (1, 2, 3, 4)
    )
    return {
        STATE: state.text().encode(),
        CONFIG: to_yaml(config).encode(),
        METRICS: metrics.encode(),
        f"{TRAINER}/shard-00001-model-00001-of-00001.safetensors": safetensors(_header(), b"".join(_data())),
    }


def _data() -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in TENSORS.values()]


def _header() -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in TENSORS.items():
        size = tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    sharding = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in TENSORS.items()}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    return header


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header, default=lambda _: None).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length % (1 << 64)) + text + data


LARGE = [1, 2, 3, 7, 8, 99, 100, 101, 1000, 1 << 20, 1 << 27, 1 << 31, 1 << 40, (1 << 63) - 1]


@st.composite
def _extreme_state(draw: st.DrawFn) -> Any:
    """Draw a consistent state with numbers far from any run's."""
    drawn = draw(st.lists(st.tuples(st.sampled_from(LARGE), st.sampled_from(LARGE)), min_size=1, max_size=3))
    state = json.loads(GOOD[STATE])
    step = sum(batches for batches, _ in drawn) if draw(st.integers(0, 9)) else draw(st.sampled_from(LARGE))
    state |= {"step": step, "samples_seen": draw(st.sampled_from([0, *LARGE]))}
    state["data"] |= {"drawn": drawn, "prompts": draw(st.sampled_from([100, *LARGE]))}
    return state


PROMPTS = [Prompt(f"p{i}", "", (i,), "") for i in range(100)]
GOOD = files()
_TENSORS = next(name for name in GOOD if name.endswith(".safetensors"))


@st.composite
def _checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the kind, the changed files (None: deleted), other entries, and the flag for a new list of checksums."""
    kind = draw(st.sampled_from(["good", "damaged", "damaged", "state", "config", "metrics", "manifest", "special"]))
    value: dict[str, Any] = {"kind": kind, "files": {}, "special": None, "sealed": kind not in ("damaged", "manifest")}
    if kind == "damaged":
        name = draw(st.sampled_from(sorted([*GOOD, "manifest.json", "complete"])))
        value["files"][name] = draw(st.none() | mutated(GOOD.get(name, b"a" * 64)).map(lambda d: (d, name)))
    elif kind == "state":
        changed = draw(replanted(json.loads(GOOD[STATE])) | _extreme_state())
        text = json.dumps(changed, default=lambda _: None).encode()
        value["files"][STATE] = draw(st.sampled_from([text, b"[" * 100_000, b"\xff" + text, text[:-9], b""]))
    elif kind == "config":
        value["files"][CONFIG] = draw(mutated(GOOD[CONFIG]) | st.sampled_from(CONFIG_LINES))
    elif kind == "metrics":
        lines = st.sampled_from([
            b"[" * 100_000, b"[]", b"{}", b'{"step": "x"}', b'{"step": 1, "a": "b"}', b"\xff", b"",
            b'{"step": 1e999}', b'{"step": ' + b"9" * 5000 + b"}", b"null", b'{"step": 5}',
        ])  # fmt: skip
        value["files"][METRICS] = draw(
            st.none() | mutated(GOOD[METRICS]) | lines.map(lambda x: GOOD[METRICS] + x + b"\n")
        )
    elif kind == "manifest":
        value["names"] = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2))
        value["replanted"] = draw(
            st.none() | replanted({"format": 1, "files": {STATE: {"size": 1, "sha256": "a" * 64}}})
        )
    elif kind == "special":
        value["special"] = (
            draw(st.sampled_from(SPECIAL)),
            draw(st.sampled_from(sorted([*GOOD, "complete", "manifest.json"]))),
        )
    return value


class Checkpoints:
    name = "checkpoints"

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp())
        self._good = self._root / "good"
        self._write(self._good, GOOD)
        seal(self._good, {name: file_sum(self._good / name) for name in files_below(self._good)})
        (self._root / "outside").write_text("secret")
        self._file = self._root / "config.yaml"
        self._config = RLVRConfig.model_validate(
            yaml.safe_load(MINIMAL) | {"pretrain": "/nowhere/at/all", "output_dir": str(self._root / "output")}
        )
        self._file.write_text(to_yaml(self._config))
        self._progress = Progress(4, io.StringIO())

    def _write(self, folder: Path, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def inputs(self) -> st.SearchStrategy[Any]:
        return _checkpoints()

    def judge(self, value: dict[str, Any]) -> Verdict:
        folder = self._root / "step-00000004"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._good, folder)
        same = self._change(folder, value)
        said = [
            call(run.main, ["--config", str(self._file), "--validate-only", "--", f"resume_from_checkpoint={folder}"]),
            call(export.main, ["--checkpoint", str(folder), "--output", str(self._root / "exported")]),
        ]
        for status, _, err in said:
            check_said(status, err)
            if status == 0:
                raise Wrong("neither has a model here")
        if (self._root / "exported").exists() or Path("touched").exists():
            raise Wrong("something was made")
        if "secret" in said[0][2] + said[1][2]:
            raise Wrong("a file outside was read")
        try:
            self._resume(folder)
        except (ConfigError, CheckpointError) as error:
            if not str(error).isprintable() or len(str(error)) > 20_000:
                raise Wrong(f"a message that cannot be shown: {str(error)[:200]!r}") from error
            if value["kind"] == "good":
                raise Wrong(f"refused, and is right: {error}") from error
            return "refused"
        if not value["sealed"] and not same:
            raise Wrong("taken, though it is not as it was sealed")
        if value["special"] and not same:
            raise Wrong(f"taken with {value['special']}")
        return "taken"

    def _change(self, folder: Path, value: dict[str, Any]) -> bool:
        """Change a good checkpoint; return True if its files are as they were sealed."""
        for name, data in value["files"].items():
            if data is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(self._damaged(folder / name, data) if isinstance(data, tuple) else data)
        if value["special"]:
            return self._place(folder, *value["special"])
        if value["kind"] == "manifest":
            self._forge(folder, value)
        elif value["sealed"] and value["kind"] != "good":
            for name in ("manifest.json", "complete"):
                (folder / name).unlink()
            seal(folder, {name: file_sum(folder / name) for name in files_below(folder)})
        return self._same(folder)

    def _same(self, folder: Path) -> bool:
        names = files_below(folder)
        return names == files_below(self._good) and all(
            (folder / name).read_bytes() == (self._good / name).read_bytes() for name in names
        )

    def _damaged(self, path: Path, data: tuple[bytes, str]) -> bytes:
        """Return drawn data for known files; list and marker are not known in advance and are cut short."""
        return data[0] if data[1] in GOOD else path.read_bytes()[: len(data[0])] + data[0][:1]

    def _forge(self, folder: Path, value: dict[str, Any]) -> None:
        listed = json.loads((folder / "manifest.json").read_text())
        for name in value["names"]:
            listed["files"][name] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
        chosen = listed if value["replanted"] is None else value["replanted"]
        text = json.dumps(chosen, default=lambda _: None)
        (folder / "manifest.json").write_text(text)
        (folder / "complete").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")

    def _place(self, folder: Path, kind: str, name: str) -> bool:
        path = folder / name
        if kind in ("extra", "deep", "odd name", "link up"):
            if kind == "extra":
                (folder / "more").write_text("x")
            elif kind == "odd name":
                (folder / os.fsdecode(b"\xff\x1b[2J\n")).write_text("x")
            elif kind == "link up":
                (folder / "loop").symlink_to("..")
            else:
                here = folder
                for _ in range(200):
                    here = here / "d"
                    here.mkdir()
            return False
        content = path.read_bytes()
        path.unlink()
        if kind == "link":
            (self._root / "elsewhere").write_bytes(content)
            path.symlink_to(self._root / "elsewhere")
        elif kind == "link out":
            path.symlink_to("/dev/zero")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            os.mknod(path, 0o140600)
        elif kind == "directory":
            path.mkdir()
        return False

    def _resume(self, folder: Path) -> None:
        """Do the first part of a resume, before anything starts."""
        config = self._config.model_copy(update={"resume_from_checkpoint": str(folder)})
        try:
            with resume.opened(config, datetime.now(), self._progress) as (run_dir, point):
                assert point is not None
                for line in resume.changes(config, point):
                    if len(line) > 1000 or not line.isprintable():
                        raise Wrong(f"a line that cannot be shown: {len(line)} characters: {line[:200]!r}")
                resume.rewind(run_dir, point, lambda text: None)
                with MetricLog(run_dir, ()):
                    pass
                place = place_of(point.state.data)
                prompt_source(PROMPTS, 8, 42, shares={}, section_of=str, place=place).parts[0].draw(8)
        finally:
            shutil.rmtree(self._config.output_dir, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._root)


@st.composite
def _tensor_files(draw: st.DrawFn) -> list[bytes]:
    data = b"".join(_data())
    kind = draw(st.sampled_from(["good", "header", "header", "bytes", "length", "sharding", "two", "data"]))
    header = _header()
    if kind == "header":
        return [safetensors(draw(replanted(header)), data)]
    if kind == "bytes":
        return [draw(mutated(GOOD[_TENSORS]))]
    if kind == "length":
        return [safetensors(header, data, draw(st.sampled_from([0, 1, -1, 1 << 62, 1 << 40, 100_000_001, len(data)])))]
    if kind == "sharding":
        changed = draw(replanted(json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])))
        text = json.dumps(changed, default=lambda _: None)
        header["__metadata__"]["DCP_SHARDING_INFO"] = draw(st.sampled_from([text, "[" * 100_000, "", "x"]))
        return [safetensors(header, data)]
    if kind == "two":
        return [GOOD[_TENSORS], draw(mutated(GOOD[_TENSORS]))]
    if kind == "data":
        return [safetensors(header, data[: draw(st.integers(0, len(data)))])]
    return [GOOD[_TENSORS]]


class Tensors:
    """Trainer's tensors, read by the same collective as in a run, in a world of one."""

    name = "tensors"

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp())
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def inputs(self) -> st.SearchStrategy[Any]:
        return _tensor_files()

    def judge(self, value: list[bytes]) -> Verdict:
        folder = self._root / "trainer"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for i, data in enumerate(value):
            (folder / f"shard-{i:05d}-model-00001-of-00001.safetensors").write_bytes(data)
        state = {name: torch.full_like(tensor, -1.0) for name, tensor in TENSORS.items()}
        try:
            checkpoint.load([state], folder)
        except RollError as error:
            if value == [GOOD[_TENSORS]]:
                raise Wrong(f"refused, and is right: {error}") from error
            return "refused"
        for name, tensor in state.items():
            if not any(_same_numbers(tensor, _read_tensor(data, name)) for data in value):
                raise Wrong(f"{name} is {tensor.tolist()}")
        return "taken"

    def close(self) -> None:
        dist.destroy_process_group()
        shutil.rmtree(self._root)


def _same_numbers(tensor: torch.Tensor, wanted: np.ndarray | None) -> bool:
    return wanted is not None and np.array_equal(tensor.numpy(), wanted.astype(np.float32), equal_nan=True)


def _read_tensor(data: bytes, name: str) -> np.ndarray | None:
    """Return a tensor of a file, read by the description of the format alone."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        entry = json.loads(data[8 : 8 + length])[name]
        start, end = entry["data_offsets"]
        kinds = {
            "F32": "<f4",
            "F64": "<f8",
            "F16": "<f2",
            "I32": "<i4",
            "I64": "<i8",
            "U8": "u1",
            "I8": "i1",
            "I16": "<i2",
        }
        held = np.frombuffer(data[8 + length + start : 8 + length + end], kinds[entry["dtype"]])
        return held.reshape(entry["shape"])
    except (KeyError, ValueError, TypeError, struct.error):
        return None
