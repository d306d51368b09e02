"""Values of rows: exactly as in the file, or rejected."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_r3.config.workers import DataArgs
from roll_r3.data.faults import Faults
from roll_r3.data.row_reader import read_rows, validate_rows

USER = [{"role": "user", "content": "1+1="}]


def read(path, **columns):
    """Return (rows, faults) of a file."""
    faults = Faults()
    rows = list(read_rows(DataArgs(file_name=str(path), **columns), faults))
    return rows, list(faults.lines())


def of_line(tmp_path, line, **columns):
    """Return (rows, faults) of one JSON line, without the file's name in the faults."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    rows, faults = read(path, **columns)
    return rows, [fault.removeprefix(f"{path} ") for fault in faults]


def test_text_is_kept_as_it_is(tmp_path):
    """Blanks, line ends, letters in two forms, text like other kinds of values."""
    for text in [
        " a\r\n\tb ",
        "é",
        "e\u0301",
        "2024-01-05",
        "1e-05",
        "None",
        "\\$18",
        "",
        "[1, 2]",
        "\u2028",
        "\0",
        "1.50",
    ]:
        line = json.dumps({"prompt": text, "ground_truth": text, "tag": text, "more": {"inner": [text]}})
        for written in (line, json.dumps(json.loads(line), ensure_ascii=False)):
            [row], faults = of_line(tmp_path, written, domain="tag")
            assert not faults
            assert (row.messages[0]["content"], row.ground_truth, row.domain) == (text, text, text)
            assert row.columns == json.loads(line)


@pytest.mark.parametrize(
    "number", ["2", "-3", "-0", "0.5", "2.50", "-0.0", "123456789012345678901234567890", "0.1234567890123456789012"]
)
def test_numbers_keep_their_digits(tmp_path, number):
    [row], faults = of_line(tmp_path, f'{{"prompt": "a", "ground_truth": {number}}}')
    assert not faults
    assert row.ground_truth == number
    assert row.columns["ground_truth"] == json.loads(number)
    assert type(row.columns["ground_truth"]) is type(json.loads(number))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-5", 'is 1e-5, a number with an exponent, not text. Instead, write text: "1e-5"'),
        ("1E5", "is 1E5, a number with an exponent"),
        ("true", 'is true, a boolean, not text. Instead, write text: "true"'),
        ("null", "is null. Instead, write text, or remove the row"),
        ('{"inputs": ["1"]}', 'an object, not text. Instead, name one of its fields, such as "ground_truth.inputs"'),
        ("[1]", "is [1], a list, not text. Instead, write text, or JSON text of the list"),
    ],
)
def test_a_ground_truth_other_than_text_is_rejected(tmp_path, value, expected):
    rows, [fault] = of_line(tmp_path, f'{{"prompt": "a", "ground_truth": {value}}}')
    assert not rows
    assert fault.startswith('line 1: column "ground_truth" ')
    assert expected in fault


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (USER, 'a conversation, not text. Instead, name the column in data_args.messages: "prompt"'),
        (json.dumps(USER), 'Instead, name the column in data_args.messages: "prompt"'),
        (str(USER), 'Instead, name the column in data_args.messages: "prompt"'),
        ('[{"name": "x", "role": "user", "content": "a"}]', "Instead, name the column in data_args.messages"),
        ({"text": "a"}, "Instead, name the column in data_args.messages"),
        (None, "is null"),
        (3, "is 3, a number, not text"),
        (2.5, "is 2.5, a number, not text"),
        (False, "is false, a boolean, not text"),
    ],
)
def test_a_prompt_other_than_text_is_rejected(tmp_path, value, expected):
    rows, [fault] = of_line(tmp_path, json.dumps({"prompt": value, "ground_truth": "2"}))
    assert not rows
    assert fault.startswith('line 1: column "prompt" is ')
    assert expected in fault


@pytest.mark.parametrize("value", ["\u202e", "\x1b[2J", "\u2028", "x" * 5000])
def test_values_are_shown_escaped_and_cut(tmp_path, value):
    for row in ({"prompt": "a", "ground_truth": [value]}, {"prompt": "a", value: "1"}, {"prompt": {value: 1}}):
        for fault in of_line(tmp_path, json.dumps(row))[1]:
            assert fault.isprintable()
            assert len(fault) < 400


@pytest.mark.parametrize("text", ["[x] and [{'a': 1}]", "[1, 2]", '[{"a": 1}]', "[", "role: user"])
def test_a_prompt_may_look_like_a_list(tmp_path, text):
    [row], _ = of_line(tmp_path, json.dumps({"prompt": text, "ground_truth": "2"}))
    assert row.messages == ({"role": "user", "content": text},)


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": " 1+"}, {"type": "text", "text": "1= ", "image": None}]
    messages = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": parts}]
    for value in (messages, json.dumps(messages)):
        [row], _ = of_line(tmp_path, json.dumps({"m": value, "ground_truth": "2"}), messages="m")
        assert row.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": " 1+1= "})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": None}], "the content of m[0] is null, not text"),
        ([{"role": "user", "content": []}], "the content of m[0] is [], not text"),
        ([{"role": "user", "content": 3}], "the content of m[0] is 3, not text"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "images are not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "image": "x.png"}]}], "images are not supported"),
        ([{"role": "user", "content": ["a"]}], 'has the part "a", not text'),
        ([{"from": "human", "value": "a"}], "without role and content"),
        ([{"role": "user"}], "without role and content"),
        ([{"role": None, "content": "a"}], "has the role null"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], 'has "tool_calls" besides role and content'),
        ([], 'column "m" is [], not a list of messages'),
        ({"role": "user", "content": "a"}, "not a list of messages"),
        ("hello", "not JSON"),
        ([*USER, {"role": "assistant", "content": "2"}], 'column "m" ends with a message of the assistant'),
        ([*USER, {"role": "gpt", "content": "2"}], "ends with a message of the gpt"),
    ],
)
def test_a_conversation_of_another_shape_is_rejected(tmp_path, messages, expected):
    rows, [fault] = of_line(tmp_path, json.dumps({"m": messages, "ground_truth": "2"}), messages="m")
    assert not rows
    assert expected in fault


def test_missing_values_are_counted_by_column(tmp_path):
    lines = ['{"prompt": "1", "ground_truth": "1"}', '{"prompt": "2+2="}', "", '{"question": "3", "ground_truth": "6"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines + ['{"prompt": "x"}'] * 6))
    rows, faults = read(path)
    assert [row.ground_truth for row in rows] == ["1"]
    assert [fault.removeprefix(f"{path} ") for fault in faults] == [
        'line 2: column "ground_truth" is missing, there are "prompt". Instead, add it to each row, or correct '
        "data_args.ground_truth (7 rows: lines 2, 5, 6, 7, 8, ...)",
        'line 4: column "prompt" is missing, there are "question", "ground_truth". Instead, add it to each row, or '
        "correct data_args.prompt",
    ]


@pytest.mark.parametrize("column", ["domain", "id"])
def test_domains_and_ids_are_text_too(tmp_path, column):
    for value, expected in ((None, "is null"), ([], "a list"), ("", "is empty")):
        rows, faults = of_line(tmp_path, json.dumps({"prompt": "a", "ground_truth": "", "x": value}), **{column: "x"})
        if (column, value) == ("domain", ""):
            assert rows[0].domain == ""
        else:
            assert not rows
            assert expected in faults[0]
    [row], _ = of_line(tmp_path, '{"prompt": "a", "ground_truth": "", "x": 7}', **{column: "x"})
    assert getattr(row, column) == "7"


def test_a_dotted_name_is_a_field_within_a_column(tmp_path):
    verl = {
        "data_source": "gsm8k",
        "prompt": USER,
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 3, "split": "train"},
    }
    named = {
        "messages": "prompt",
        "ground_truth": "reward_model.ground_truth",
        "domain": "data_source",
        "id": "extra_info.index",
    }
    pq.write_table(pa.Table.from_pylist([verl]), tmp_path / "verl.parquet")
    (tmp_path / "verl.jsonl").write_text(json.dumps(verl))
    for name in ("verl.parquet", "verl.jsonl"):
        [row], faults = read(tmp_path / name, **named)
        assert not faults
        assert (row.messages, row.ground_truth, row.domain, row.id) == (tuple(USER), "2", "gsm8k", "3")
        assert row.columns == verl
    [row], _ = of_line(tmp_path, '{"prompt": "a", "r.g": "1", "r": {"g": "2"}}', ground_truth="r.g")
    assert row.ground_truth == "1", "a column with this very name goes first"
    pq.write_table(pa.table({"prompt": ["a"], "r.g": ["1"], "r": [{"g": "2"}]}), tmp_path / "r.parquet")
    [row], _ = read(tmp_path / "r.parquet", ground_truth="r.g")
    assert row.ground_truth == "1"
    assert row.columns == {"prompt": "a", "r.g": "1", "r": {"g": "2"}}
    for value, expected in (({"h": "1"}, 'there are "h"'), ({"g": None}, "is null"), ('{"g": "2"}', "has no fields")):
        rows, [fault] = of_line(tmp_path, json.dumps({"prompt": "a", "r": value}), ground_truth="r.g")
        assert not rows
        assert expected in fault


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b'{"prompt": "b", "grou',
            "not JSON, Unterminated string starting at column 17 (the text seems to be truncated)",
        ),
        (b'{"prompt": "b",', "(the text seems to be truncated)"),
        (b'{"prompt": "\xe9"}', "not UTF-8, byte 0xE9 at byte 13. Instead, save the file as UTF-8"),
        (b"\xff\xfe{\0}\0", "not UTF-8, byte 0xFF at byte 1"),
        (b'{"prompt": "a", "ground_truth": "1", "prompt": "b"}', 'the key "prompt" occurs twice'),
        (b'{"prompt": "a", "ground_truth": "1", "more": [{"x": 1, "x": 2}]}', 'the key "x" occurs twice'),
        (b'{"prompt": "a", "ground_truth": "1", "more": NaN}', "NaN is not a value of JSON"),
        (b'{"prompt": "a", "ground_truth": "1", "more": -Infinity}', "-Infinity is not a value of JSON"),
        (b'{"prompt": "a", "ground_truth": "1", "more": 1e999}', "the number 1e999 is too large"),
        (b'{"prompt": "a", "ground_truth": ' + b"9" * 5000 + b"}", "a number has 5000 digits"),
        (b'{"prompt": "a\\ud800", "ground_truth": "1"}', "half of a surrogate pair, \\ud800"),
        (b'{"prompt": "a", "ground_truth": "1", "\\udfff": 1}', "half of a surrogate pair"),
        (b'{"prompt": "a", "ground_truth": "1", "more": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 levels"),
        (b'{"prompt": "a", "ground_truth": "1", "more": ' + b"[" * 90000, "more than 100 levels"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON, Extra data"),
        (b"3", "3 is not an object"),
        (b'[{"prompt": "a", "ground_truth": "1"}]', "is not an object"),
        (b"\x1b[2J", "not JSON"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "ground_truth": "1"}\n' + line)
    rows, [fault] = read(path)
    assert len(rows) == 1
    assert fault.startswith(f"{path} line 2: ")
    assert expected in fault
    assert fault.isprintable()
    assert len(fault) < 400


def test_types_may_change_within_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = json.dumps({"prompt": "x" * 1000, "ground_truth": 1, "more": 1}) + "\n"
    path.write_text(first * 11_000 + json.dumps({"prompt": "a", "ground_truth": "text", "more": [None]}))
    rows, faults = read(path)
    assert not faults
    assert (rows[0].ground_truth, rows[-1].ground_truth, rows[-1].columns["more"]) == ("1", "text", [None])


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_form_gives_the_same_rows(tmp_path, form):
    wanted = [
        {"prompt": f" {i}\r\n", "ground_truth": str(i), "n": i, "f": 0.5, "b": True, "x": None, "l": [{"k": "v"}, None]}
        for i in range(2500)
    ]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(wanted), path, row_group_size=700)
    else:
        text = json.dumps(wanted) if form == "json" else "".join(json.dumps(row) + "\n" for row in wanted)
        packed = b"\xef\xbb\xbf" + text.encode()
        path.write_bytes(gzip.compress(packed, mtime=0) if form == "jsonl.gz" else packed)
    rows, faults = read(path)
    assert not faults
    assert [row.columns for row in rows] == wanted
    assert [row.id for row in rows] == [f"rows-{i}" for i in range(2500)]
    assert rows[-1].place.number == 2500


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "it is empty"),
        ("a.jsonl", b"\n \r\n", "it is empty"),
        ("a.json", b"", "it is empty"),
        ("a.json", b" [ ] ", "it is empty"),
        ("a.json", b'{"data": [{"prompt": "a"}]}', 'not a list, it begins with "{'),
        ("a.json", b'[{"prompt": "a"}', "the list has no end (the file seems to be truncated)"),
        ("a.json", b'[{"prompt": "a"}\n,]', "not JSON"),
        ("a.json", b"[3]", "row 1: 3 is not an object"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "ground_truth": "1"}\n' * 9, mtime=0)[:-12], "cannot be read"),
        ("a.jsonl.gz", b"{}", "cannot be read, BadGzipFile"),
        ("a.parquet", b"PAR1" * 9, "cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    faults = read(tmp_path / name)[1]
    assert expected in faults[-1]
    assert all(fault.startswith(str(tmp_path / name)) for fault in faults)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(1000)], "ground_truth": ["1"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    rows, [fault] = read(path)
    assert not rows
    assert fault.startswith(f"{path}: cannot be read, ArrowInvalid: ")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({b"\x16\xd8\x04": b"\x16\xd6\x04"}, "299 rows, but its groups have 300"),
        ({b"\x16\xd8\x04": b"\x16\x94\x05", b"\x16\xc8\x01": b"\x16\xdc\x01"}, "330 more rows after row 0"),
    ],
    ids=["in all", "in the groups"],
)
def test_a_parquet_file_with_wrong_row_counts_is_named(tmp_path, changed, expected):
    """The footer holds 300 and 100 as Thrift writes them."""
    path = tmp_path / "a.parquet"
    columns = {"prompt": [str(i) for i in range(300)], "ground_truth": ["1"] * 300}
    pq.write_table(pa.table(columns), path, row_group_size=100)
    content = path.read_bytes()
    for old, new in changed.items():
        content = content.replace(old, new)
    path.write_bytes(content)
    assert expected in read(path)[1][0]


DAY = datetime.date(2024, 1, 5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([DAY], 'is "2024-01-05", date, not text'),
        ([datetime.datetime(2024, 1, 5, 12)], "datetime, not text"),
        ([decimal.Decimal("1.50")], "Decimal, not text"),
        ([b"1"], "binary, not text"),
        ([0.5], "a float without its written digits, not text"),
        ([None], "is null"),
    ],
)
def test_parquet_values_other_than_text_are_rejected(tmp_path, values, expected):
    pq.write_table(pa.table({"prompt": ["a"], "ground_truth": values}), tmp_path / "a.parquet")
    rows, [fault] = read(tmp_path / "a.parquet")
    assert not rows
    assert "row 1: " in fault
    assert expected in fault


def test_columns_without_a_form_in_json_are_left_out_and_logged(tmp_path, caplog):
    columns = {"prompt": ["a"], "ground_truth": ["1"], "day": [DAY], "deep": [{"day": DAY, "truth": "2"}], "n": [1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    [row], faults = read(tmp_path / "a.parquet", ground_truth="deep.truth")
    assert not faults
    assert row.ground_truth == "2"
    assert row.columns == {"prompt": "a", "ground_truth": "1", "n": 1}
    assert 'do not receive columns without a JSON form: "day", "deep"' in caplog.text


@pytest.mark.parametrize("looked", [False, True])
def test_a_parquet_file_with_other_columns_alone_lists_them(tmp_path, looked):
    pq.write_table(pa.table({"day": [DAY] * 3, "n": [1] * 3}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"day": [DAY] * 3}), tmp_path / "b.parquet")
    args, faults = DataArgs(file_name=str(tmp_path / "*.parquet")), Faults()
    if looked:
        validate_rows(args, faults)
    else:
        assert not list(read_rows(args, faults))
    assert len(faults) == 4
    assert all("is missing, there are" in fault and "(3 rows: rows 1, 2, 3)" in fault for fault in faults.lines())


def test_parquet_text_other_than_utf_8_is_rejected(tmp_path):
    words = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"]).buffers())
    pq.write_table(pa.table({"prompt": words, "ground_truth": ["1"]}), tmp_path / "a.parquet")
    rows, [fault] = read(tmp_path / "a.parquet")
    assert not rows
    assert "UnicodeDecodeError" in fault


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "ground_truth": ""}))
    rows, faults = read(tmp_path / "*.jsonl")
    assert not faults
    assert [row.messages[0]["content"] for row in rows] == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert len(read(tmp_path / "[x].jsonl")[0]) == 1, "a file of this very name"
    assert "no file matches this pattern" in read(tmp_path / "*.parquet")[1][0]
    assert "not a file of a known format" in read(tmp_path / "*.txt")[1][0]
    assert "no file matches" in read("nul\0*.jsonl")[1][0]


def test_the_faults_of_all_files_are_reported_together(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.jsonl").write_text('{"prompt": "a"}\n')
    faults = read(tmp_path / "*.jsonl")[1]
    assert len(faults) == 21
    assert faults[-1] == "and 5 more kinds of faults in 5 files"


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {
        "prompt": USER,
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": 1, "share": 0.5, "t": "x" * 300},
    }
    path.write_text((json.dumps(row) + "\n") * 100_000)
    begun = time.process_time()
    faults = Faults()
    args = DataArgs(file_name=str(path), messages="prompt", ground_truth="reward_model.ground_truth")
    assert sum(1 for _ in read_rows(args, faults)) == 100_000
    assert time.process_time() - begun < 15
