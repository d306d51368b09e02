"""Hostile files of rows in every form, through a run's reader and through the check before it.

Accepted rows are compared with a second reading of the file, by the plain parsers of Python and Arrow.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_harness import Verdict, Wrong, mutated, replanted
from hypothesis import strategies as st

from roll_r3.config.workers import DataArgs
from roll_r3.data.faults import Faults
from roll_r3.data.prompts import read_prompts
from roll_r3.data.row_reader import read_rows, validate_rows
from roll_r3.errors import ConfigError
from roll_r3.models.tiny import byte_tokenizer

MESSAGE = 12_000
"""Characters of the longest report."""
TEXTS = [
    " a\r\n",
    "é",
    "e\u0301",
    "2024-01-05",
    "None",
    "1e-05",
    "\\$18",
    "[1]",
    "\u2028",
    "\0",
    "<|im_start|>",
    "\U0001f600",
]
FORMS = ("jsonl", "jsonl.gz", "json", "parquet")
COLUMNS: dict[str, dict[str, str]] = {
    "plain": {"prompt": "q", "ground_truth": "a", "domain": "t", "id": "n"},
    "verl": {"messages": "p", "ground_truth": "r.g", "domain": "s"},
    "roll": {"messages": "m", "ground_truth": "g"},
    "dotted": {"prompt": "x.q", "ground_truth": "x.a"},
}
KINDS = [
    "as it is", "as it is", "planted", "planted", "planted", "numbers", "numbers", "twice", "lines", "lines", "mutated",
    "mutated",
]  # fmt: skip
NUMBERS = ["0", "-0", "7", "0.10", "-2.50", "1e5", "1E-5", "1e999", "9" * 30, "9" * 4500, "0.1234567890123456789", "-"]
PLACE = "@"
"""Text replaced by numbers, as written."""
TWICE = [b'"k": "v",', b'"q": "x",', b'"g": "1",', b'"a": "1",', b'"l": "1",']
LINES = [
    b"", b" \r", b"\xef\xbb\xbf", b"3", b"null", b"[]", b"{}", b'"x"', b'{"q": "a", "a": 1, "q": "b"}', b"[" * 30_000,
    b'{"q": "a", "a": NaN}', b'{"q": "\\ud800", "a": ""}', b"\xe9", b'{"q": "a", "a": "b"', b"\x1b[2J", b"{'q': 'a'}",
    b'{"q": [{"role": "user", "content": "x"}], "a": "1"}', b'{"q": "[{\\"role\\": \\"user\\"}]", "a": "1"}',
    b'{"m": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "g": "1"}',
    b'{"m": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "g": 0.50}',
    b'{"p": [{"role": "user", "content": null}], "r": {"g": null}, "s": "t"}', b'{"x": {"q": "a"}, "x.a": 1}',
    b'{"q": "a", "a": "b", "more": ' + b"[" * 150 + b"]" * 150 + b"}", b'{"q": {"a": {}}, "a": {"b": [1]}}',
]  # fmt: skip
ARROW: list[Callable[[int], pa.Array]] = [
    lambda n: pa.array([datetime.date(2024, 1, 5)] * n), lambda n: pa.array([decimal.Decimal("1.50")] * n),
    lambda n: pa.array([b"\xe9"] * n), lambda n: pa.array([0.5] * n), lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array(["1"] * n).dictionary_encode(), lambda n: pa.array(["1"] * n, pa.large_string()),
    lambda n: pa.array([[("k", "v")]] * n, pa.map_(pa.string(), pa.string())), lambda n: pa.nulls(n),
    lambda n: pa.array([(1 << 64) - 1] * n, pa.uint64()), lambda n: pa.array([True] * n),
    lambda n: pa.array([datetime.datetime(2024, 1, 5)] * n), lambda n: pa.array([datetime.timedelta(1)] * n),
    lambda n: pa.array([[{"role": "user", "content": "x", "name": None}]] * n),
    lambda n: pa.array([1 << 62] * n, pa.timestamp("s")), lambda n: pa.array([[1, None]] * n),
]  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One input."""

    form: str
    content: bytes
    columns: dict[str, str]
    sound: bool
    """True if nothing is wrong with the input."""


def _row(shape: str, i: int, text: str) -> dict[str, Any]:
    chat = [{"role": "system", "content": text}, {"role": "user", "content": f"q{i}"}]
    return {
        "plain": {
            "q": f"q{text}",
            "a": text,
            "t": text,
            "n": f"n{i}",
            "more": {"l": [i], "f": 0.125, "x": None, "k": text},
        },
        "verl": {"p": chat, "r": {"g": text, "style": "rule"}, "s": "gsm", "extra": {"index": i}},
        "roll": {"m": json.dumps(chat), "g": text},
        "dotted": {"x": {"q": f"q{i}", "a": text}},
    }[shape]


@st.composite
def _files(draw: st.DrawFn) -> Drawn:
    form, shape = draw(st.sampled_from(FORMS)), draw(st.sampled_from(list(COLUMNS)))
    kind = draw(st.sampled_from(KINDS))
    texts = st.just(PLACE) if kind == "numbers" else st.sampled_from(TEXTS)
    rows: list[Any] = [_row(shape, i, draw(texts)) for i in range(draw(st.integers(1, 5)))]
    if kind == "planted":
        rows = draw(replanted(rows))
    if form == "parquet":
        content = _parquet(rows, draw, planted=kind in ("numbers", "lines"))
    else:
        content = _text(rows, draw, form, kind)
    if kind == "mutated":
        content = draw(mutated(content))
    return Drawn(form, content, COLUMNS[shape], kind == "as it is")


def _text(rows: Any, draw: st.DrawFn, form: str, kind: str) -> bytes:
    escaped = draw(st.booleans())
    listed = rows if isinstance(rows, list) else [rows]
    lines = [json.dumps(row, ensure_ascii=escaped).encode(errors="surrogatepass") for row in listed]
    if kind == "numbers":
        lines = [line.replace(json.dumps(PLACE).encode(), draw(st.sampled_from(NUMBERS)).encode()) for line in lines]
    if kind == "twice":
        lines[0] = lines[0].replace(b": {", b": {" + draw(st.sampled_from(TWICE)), 1)
        lines[-1] = lines[-1][:-1] + b", " + draw(st.sampled_from(TWICE))[:-1] + b"}"
    if kind == "lines":
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(LINES)))
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    content = end.join(lines) + draw(st.sampled_from([b"", end])) if form != "json" else b"[" + b",".join(lines) + b"]"
    if not isinstance(rows, list) and form == "json":
        content = lines[0]
    if draw(st.sampled_from([False] * 5 + [True])):
        content = b"\xef\xbb\xbf" + content
    if form != "jsonl.gz":
        return content
    packed = gzip.compress(content, mtime=0)
    return packed if kind != "mutated" or draw(st.booleans()) else packed + content


def _parquet(rows: Any, draw: st.DrawFn, *, planted: bool) -> bytes:
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError, KeyError):
        table = pa.table({"q": ["a"], "a": ["1"]})  # no table can hold them
    if planted and table.num_columns:
        name = draw(st.sampled_from(table.column_names))
        array = draw(st.sampled_from(ARROW))(table.num_rows)
        table = table.set_column(table.column_names.index(name), draw(st.sampled_from([name, name, "q"])), array)
    stream = io.BytesIO()
    options: dict[str, Any] = {
        "row_group_size": draw(st.sampled_from([1, 2, 1000])),
        "compression": draw(st.sampled_from(["none", "snappy", "zstd"])),
        "write_page_checksum": draw(st.booleans()),
    }
    try:
        pq.write_table(table, stream, **options)
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return stream.getvalue()


class _Literal:
    """A number as written in the file."""

    def __init__(self, text: str) -> None:
        self.text = text


def _second_reading(form: str, path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (row, the same row with numbers as written) by plain parsers.

    Raises:
        Exception: the parsers cannot read the file.
    """
    if form == "parquet":
        for row in pq.read_table(path, use_threads=False).to_pylist():
            yield row, row
        return
    content = path.read_bytes()
    text = (gzip.decompress(content) if form == "jsonl.gz" else content).decode("utf-8-sig")
    texts = [text] if form == "json" else [line for line in text.split("\n") if line.strip(" \t\r")]
    for line in texts:
        plain = json.loads(line, object_pairs_hook=_once)
        written = json.loads(line, parse_float=_Literal, parse_int=_Literal)
        yield from zip(plain, written, strict=True) if form == "json" else [(plain, written)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _at(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row[name]
    return row


def _as_text(value: Any) -> str:
    """Return the text of a value."""
    if isinstance(value, _Literal):
        return value.text
    if type(value) is int:  # from Arrow
        return str(value)
    if not isinstance(value, str):
        raise Wrong(f"{value!r} is taken as text")
    return value


def _conversation(row: dict[str, Any], columns: dict[str, str]) -> list[tuple[str, str]]:
    if "prompt" in columns:
        return [("user", _text_alone(_at(row, columns["prompt"])))]
    value = _at(row, columns["messages"])
    value = json.loads(value) if isinstance(value, str) else value
    return [(m["role"], _content(m["content"])) for m in value]


def _content(value: Any) -> str:
    return "".join(_text_alone(part["text"]) for part in value) if isinstance(value, list) else _text_alone(value)


def _text_alone(value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{value!r} is taken as text")
    return value


class Rows:
    name = "rows"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._tokenizer = byte_tokenizer()

    def inputs(self) -> st.SearchStrategy[Any]:
        return _files()

    def judge(self, value: Drawn) -> Verdict:
        path = Path(self._folder.name) / f"rows.{value.form}"
        path.write_bytes(value.content)
        args = DataArgs(file_name=str(path), **value.columns)
        looked, read = Faults(), Faults()
        validate_rows(args, looked)
        list(read_rows(args, read))
        if value.form != "parquet" and list(looked.lines()) != list(read.lines()):
            raise Wrong(f"the look before the run says {list(looked.lines())}, the run {list(read.lines())}")
        try:
            prompts = read_prompts(args, self._tokenizer, 10_000, lambda text: None)
        except ConfigError as error:
            self._check_refusal(str(error), str(path))
            if value.sound:
                raise Wrong(f"refused, and is right: {error}") from error
            return "refused"
        try:
            expected = list(_second_reading(value.form, path))
        except (ValueError, OSError, EOFError, pa.ArrowException, RecursionError) as error:
            raise Wrong(f"taken, and cannot be read: {error}") from error
        if len(prompts) != len(expected):
            raise Wrong(f"{len(prompts)} of {len(expected)} rows are taken")
        for prompt, (row, written) in zip(prompts, expected, strict=True):
            self._compare(prompt, row, written, value.columns)
        return "taken"

    @staticmethod
    def _check_refusal(said: str, path: str) -> None:
        lines = said.split("\n")
        if len(said) > MESSAGE or not all(line.isprintable() for line in lines):
            raise Wrong(f"a message that cannot be shown: {said[:300]!r}")
        if path not in said or len(lines) < 2:
            raise Wrong(f"a refusal that names no file: {said[:300]}")

    @staticmethod
    def _compare(prompt: Any, row: dict[str, Any], written: dict[str, Any], columns: dict[str, str]) -> None:
        found = [(message["role"], message["content"]) for message in prompt.messages]
        if found != _conversation(row, columns):
            raise Wrong(f"the messages are {found}")
        texts = {"ground_truth": prompt.ground_truth, "domain": prompt.domain, "id": prompt.prompt_id}
        for name, text in texts.items():
            if name in columns and text != _as_text(_at(written, columns[name])):
                raise Wrong(f"{name} is {text!r}")
        for name, inner in prompt.row.items():
            if repr(inner) != repr(row[name]):  # repr distinguishes 1 from True, and NaN equals itself
                raise Wrong(f"column {name} is {inner!r}")
        json.dumps(prompt.row)

    def close(self) -> None:
        self._folder.cleanup()
