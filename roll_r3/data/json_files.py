"""Rows of .jsonl, .jsonl.gz and .json files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from roll_r3.config.readable import readable
from roll_r3.data.faults import Refused, empty, shown
from roll_r3.data.json_text import parse
from roll_r3.data.sources import Look

_MIB = 1 << 20
LONGEST_LINE = 64 * _MIB
"""Bytes of one row."""
LARGEST_JSON = 2048 * _MIB
"""Bytes of a .json file, which is read as a whole."""
_TAIL = _MIB
"""Bytes at the end of a larger file that a look reads too."""
_END = 4096
"""Bytes at either end of a large .json file that a look reads."""
_BLANK = b" \t\r\n"
_LIST = "write one list of objects, [{...}, ...], or name a file with one object a line .jsonl"
_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, EOFError, zlib.error)

Numbered = tuple[int, "dict[str, Any] | Refused"]
"""Number of a row, negative from the end of the file, and its columns as `parse` gives them."""


def jsonl_rows(file: str, look: Look | None) -> Iterator[Numbered]:
    """Rows of a file with one JSON object a line; blank lines are passed over, but counted.

    Args:
        look: None: all lines. Else as many of them at the beginning as it says, and those at the end.

    Raises:
        Refused: the file cannot be read, or not beyond a line.
    """
    number = read = found = 0
    packed = file.endswith(".gz")
    try:
        with _opened(file, packed) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise Refused(
                        "long", f"line {number} is longer than {LONGEST_LINE // _MIB} MiB", "write less in a row"
                    )
                read += len(line)
                if content := line.removeprefix(_BOM).strip(_BLANK) if number == 1 else line.strip(_BLANK):
                    found += 1
                    yield number, _row(content)
                if look is not None and (number >= look.rows or read >= look.size):
                    break
            else:
                if not found:
                    raise empty()
            if look is not None and not packed:
                yield from _last_rows(stream, read)
    except _READ_ERRORS as error:
        said = f"cannot be read{f' after line {number}' if number else ''}, {readable(error, 200)}"
        raise Refused("read", said, "write the file once more; it is damaged or cut off") from error


def _opened(file: str, packed: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file, "rb")) if packed else Path(file).open("rb")


def _last_rows(stream: IO[bytes], begun: int) -> Iterator[Numbered]:
    """The rows in the last bytes of a file, of which the first `begun` bytes are read."""
    end = stream.seek(0, 2)
    start = max(begun, end - _TAIL)
    stream.seek(start)
    lines = stream.read(_TAIL + 1).split(b"\n")
    if not lines[-1]:
        lines.pop()
    for i in range(1 if start > begun else 0, len(lines)):  # the first may have begun before
        if content := lines[i].strip(_BLANK):
            yield i - len(lines), _row(content)


def _row(line: bytes) -> dict[str, Any] | Refused:
    try:
        return _object(parse(_text(line)))
    except Refused as refused:
        return refused


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        said = f"not UTF-8, byte 0x{content[error.start]:02X} at byte {error.start + 1}"
        raise Refused("encoding", said, "save the file as UTF-8") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("no-object", f"{shown(value)} is not an object", 'write {"column": value, ...} for each row')
    return value


def json_rows(file: str, look: Look | None) -> Iterator[Numbered]:
    """Rows of a file with one JSON list of objects.

    Args:
        look: None: all rows. Else as many as it says, and none of a larger file, but its ends.

    Raises:
        Refused: the file cannot be read, or is something else.
    """
    try:
        with Path(file).open("rb") as stream:
            size = stream.seek(0, 2)
            if size > LARGEST_JSON:
                raise Refused("large", f"more than {LARGEST_JSON // _MIB} MiB", "write .jsonl, an object a line")
            stream.seek(0)
            whole = look is None or size <= look.size
            begin = stream.read(size if whole else _END).removeprefix(_BOM).lstrip(_BLANK)
            stream.seek(max(0, size - _END))
            end = stream.read(_END).rstrip(_BLANK)
    except OSError as error:
        raise Refused("read", f"cannot be read, {readable(error, 200)}", "write the file once more") from error
    if begin and not begin.startswith(b"["):
        raise Refused("no-list", f"no list, it begins with {shown(begin[:20].decode(errors='replace'))}", _LIST)
    if begin and not end.endswith(b"]"):
        raise Refused("not-json", "not JSON, the list has no end (it seems to be cut off)", _LIST)
    rows = parse(_text(begin)) if begin and whole else []
    if whole and not rows:
        raise empty()
    for number, value in enumerate(rows if look is None else rows[: look.rows], 1):
        try:
            row = _object(value)
        except Refused as refused:
            yield number, refused
        else:
            yield number, row
