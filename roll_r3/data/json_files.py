"""Reading of rows from .jsonl, .jsonl.gz and .json files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from roll_r3.config.findings.readable import readable
from roll_r3.data.faults import DataError, empty, shown
from roll_r3.data.json_text import parse
from roll_r3.data.sources import ReadLimit

_MIB = 1 << 20
LONGEST_LINE = 64 * _MIB
"""Maximum size of a row, bytes."""
LARGEST_JSON = 2048 * _MIB
"""Maximum size of a .json file, bytes; it is read as a whole."""
_TAIL = _MIB
"""Bytes read at the end of a larger file under a limit."""
_END = 4096
"""Bytes read at either end of a large .json file under a limit."""
_BLANK = b" \t\r\n"
_LIST = "write one list of objects, [{...}, ...], or rename a file with one object per line to .jsonl"
_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, EOFError, zlib.error)

Numbered = tuple[int, "dict[str, Any] | DataError"]
"""Number of a row, negative from the end of the file, and its columns as returned by `parse`."""


def jsonl_rows(file: str, limit: ReadLimit | None) -> Iterator[Numbered]:
    """Yield the rows of a file with one JSON object per line; blank lines are skipped, but counted.

    Args:
        limit: lines to read at the beginning; some at the end follow. None: all lines.

    Raises:
        DataError: the file cannot be read, or not beyond some line.
    """
    number = read = found = 0
    packed = file.endswith(".gz")
    try:
        with _opened(file, packed) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        "long", f"line {number} is longer than {LONGEST_LINE // _MIB} MiB", "write shorter rows"
                    )
                read += len(line)
                if content := line.removeprefix(_BOM).strip(_BLANK) if number == 1 else line.strip(_BLANK):
                    found += 1
                    yield number, _row(content)
                if limit is not None and (number >= limit.rows or read >= limit.size):
                    break
            else:
                if not found:
                    raise empty()
            if limit is not None and not packed:
                yield from _last_rows(stream, read)
    except _READ_ERRORS as error:
        problem = f"cannot be read{f' after line {number}' if number else ''}, {readable(error, 200)}"
        raise DataError("read", problem, "write the file again; it is damaged or truncated") from error


def _opened(file: str, packed: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file, "rb")) if packed else Path(file).open("rb")


def _last_rows(stream: IO[bytes], begun: int) -> Iterator[Numbered]:
    """Yield the rows in the last bytes of a file, after the `begun` bytes read already."""
    end = stream.seek(0, 2)
    start = max(begun, end - _TAIL)
    stream.seek(start)
    lines = stream.read(_TAIL + 1).split(b"\n")
    if not lines[-1]:
        lines.pop()
    for i in range(1 if start > begun else 0, len(lines)):  # the first may be incomplete
        if content := lines[i].strip(_BLANK):
            yield i - len(lines), _row(content)


def _row(line: bytes) -> dict[str, Any] | DataError:
    try:
        return _object(parse(_text(line)))
    except DataError as error:
        return error


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8, byte 0x{content[error.start]:02X} at byte {error.start + 1}"
        raise DataError("encoding", problem, "save the file as UTF-8") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError("no-object", f"{shown(value)} is not an object", 'write {"column": value, ...} for each row')
    return value


def json_rows(file: str, limit: ReadLimit | None) -> Iterator[Numbered]:
    """Yield the rows of a file with one JSON list of objects.

    Args:
        limit: rows to read; of a file beyond its size only both ends are checked. None: all rows.

    Raises:
        DataError: the file cannot be read, or is not a list of objects.
    """
    try:
        with Path(file).open("rb") as stream:
            size = stream.seek(0, 2)
            if size > LARGEST_JSON:
                raise DataError("large", f"more than {LARGEST_JSON // _MIB} MiB", "write .jsonl, one object per line")
            stream.seek(0)
            whole = limit is None or size <= limit.size
            begin = stream.read(size if whole else _END).removeprefix(_BOM).lstrip(_BLANK)
            stream.seek(max(0, size - _END))
            end = stream.read(_END).rstrip(_BLANK)
    except OSError as error:
        raise DataError("read", f"cannot be read, {readable(error, 200)}", "write the file again") from error
    if begin and not begin.startswith(b"["):
        raise DataError("no-list", f"not a list, it begins with {shown(begin[:20].decode(errors='replace'))}", _LIST)
    if begin and not end.endswith(b"]"):
        raise DataError("not-json", "not JSON, the list has no end (the file seems to be truncated)", _LIST)
    rows = parse(_text(begin)) if begin and whole else []
    if whole and not rows:
        raise empty()
    for number, value in enumerate(rows if limit is None else rows[: limit.rows], 1):
        try:
            row = _object(value)
        except DataError as error:
            yield number, error
        else:
            yield number, row
