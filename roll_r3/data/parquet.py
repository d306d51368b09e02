"""Reading of rows from .parquet files in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from roll_r3.config.findings.readable import readable
from roll_r3.data.faults import DataError, empty, quoted
from roll_r3.data.sources import ReadLimit

_BATCH = 1000
"""Rows in memory at a time."""
_SAMPLED_GROUPS = 8
"""Row groups of a large file sampled under a limit."""
_SAMPLED_ROWS = 100
"""Rows read of each sampled group."""


def parquet_rows(
    file: str, named: Sequence[str], limit: ReadLimit | None, left_out: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, columns) of each row.

    Args:
        named: columns named by the configuration. A dotted one may name a field of a struct.
        limit: rows to read at the beginning, of the named columns; a sample of the rest follows. None: all rows and
            columns.
        left_out: receives the columns without a JSON form. A row has them only where `named` has them.

    Raises:
        DataError: the file cannot be read, or not beyond some row.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  slow to import, and needed for these files only
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError("parquet", "the package pyarrow is not installed", "install it, or write .jsonl") from error
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            columns = _columns(opened.schema_arrow, named, limit is not None, left_out)
            for start, groups, rows in _pieces(opened.metadata, limit and limit.rows):
                number = start
                for batch in opened.iter_batches(_BATCH, row_groups=groups, columns=columns, use_threads=False):
                    for row in batch.slice(0, rows - (number - start)).to_pylist():
                        number += 1
                        yield number, row
                    if number - start >= rows:
                        break
                if number - start != rows:
                    raise ValueError(f"the file claims {rows} more rows after row {start}")
            if not opened.metadata.num_rows:
                raise empty()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        after = f" after row {number}" if number else ""
        problem = f"cannot be read{after}, {readable(error, 200)}"
        raise DataError("parquet", problem, "write the file again; it is damaged, or not parquet") from error


def _columns(schema: Any, named: Sequence[str], only_named: bool, left_out: list[str]) -> list[str]:
    """Return the columns to read."""
    if twice := [name for name, times in Counter(schema.names).items() if times > 1]:
        raise DataError("twice", f"the column {quoted(twice)} occurs twice", "remove one of the two")
    wanted = {name for column in named for name in (column, column.partition(".")[0])}
    left_out += [field.name for field in schema if not _is_json(field.type)]
    if only_named and all({name, name.partition(".")[0]} & set(schema.names) for name in named):
        return [name for name in schema.names if name in wanted]
    return [name for name in schema.names if name in wanted or name not in left_out] or schema.names


def _pieces(metadata: Any, most: int | None) -> Iterator[tuple[int, list[int], int]]:
    """Yield (rows before, row groups, rows to read) of each part to read.

    Raises:
        ValueError: the row counts of the file disagree.
    """
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(sizes) != metadata.num_rows:
        raise ValueError(f"the file claims {metadata.num_rows} rows, but its groups have {sum(sizes)}")
    if most is None or sum(sizes) <= most:
        yield 0, list(range(len(sizes))), sum(sizes)
        return
    yield 0, list(range(len(sizes))), most
    chosen = {len(sizes) * i // _SAMPLED_GROUPS for i in range(_SAMPLED_GROUPS)} | {len(sizes) - 1}
    for group in sorted(chosen):
        before = sum(sizes[:group])
        if before >= most:
            yield before, [group], min(sizes[group], _SAMPLED_ROWS)


def _is_json(kind: Any) -> bool:
    """Return True if an Arrow type holds text, numbers, booleans, null, or lists and structs of them."""
    from pyarrow import types  # noqa: PLC0415

    if types.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_is_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    simple = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_boolean, types.is_integer,
        types.is_floating, types.is_null,
    )  # fmt: skip
    return any(check(kind) for check in simple)
