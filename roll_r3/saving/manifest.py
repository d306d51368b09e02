"""What shows that a directory is whole: a list of its files with their checksums, and a marker that seals the list.

The checksums tell a whole checkpoint from a damaged one. They are no signature: who can write the files can write
those too. What is read from a checkpoint is therefore never run: it holds safetensors, JSON and YAML alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from roll_r3.config.disk import read_at_most
from roll_r3.config.readable import printable, readable
from roll_r3.config.report import show_value
from roll_r3.config.writing import naming
from roll_r3.errors import CheckpointError, RollError

MANIFEST, MARKER = "manifest.json", "complete"
_CHUNK = 8 << 20
_MAX_MANIFEST = 256 << 20
_MAX_MARKER = 1024
_MAX_DEPTH = 64
"""Directories in one another; a checkpoint has two."""
_THREADS = 8
EVERY_NODE = "every node must see the directory of checkpoints: checkpoint_config.output_dir, or output_dir"
_NOT_DAMAGE = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
        # of a disk that is reached by a network; EIO is also what a soft mount of NFS says
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
"""Why a file that may be as it should be cannot be read: by this user, or just now."""


@dataclass(frozen=True)
class FileSum:
    """What a file holds, in short."""

    size: NonNegativeInt
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    files: dict[str, FileSum]


def file_sum(path: Path, *, keep: bool = True) -> FileSum:
    """Read a file.

    Args:
        keep: it was just written: have the disk keep it.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if keep:
            os.fsync(stream.fileno())
    return FileSum(size, digest.hexdigest())


def files_below(folder: Path) -> list[str]:
    """Every file below `folder`, relative and sorted.

    Raises:
        CheckpointError: there is something that is neither a file nor a directory: a link may lead anywhere.
        OSError: a directory cannot be read.
    """
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def _walk(folder: Path, depth: int = 0) -> Iterator[Path]:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{printable(str(folder))} is {depth} directories deep")
    for entry in os.scandir(folder):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(Path(entry.path), depth + 1)
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise CheckpointError(f"{printable(entry.path)} is neither a file nor a directory")


def seal(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the list and, last of all, the marker.

    Args:
        sums: of every file below `folder`, by its relative path.

    Raises:
        CheckpointError: `sums` are not those of the files that are there.
        OSError: nothing can be written.
    """
    if differing := set(files_below(folder)) ^ set(sums):
        names = sorted(differing)
        raise CheckpointError(
            f"in {folder} {show_value(names[0])} is missing, or is of somebody else ({len(names)} such files; "
            f"{EVERY_NODE})"
        )
    text = _Manifest(format=1, files=dict(sorted(sums.items()))).model_dump_json(indent=1) + "\n"
    write_durably(folder / MANIFEST, text)
    write_durably(folder / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")
    for directory in {folder, *(path.parent for path in _walk(folder))}:
        sync_directory(directory)


def verify(folder: Path) -> None:
    """Read all of a sealed directory.

    Raises:
        CheckpointError: it was never completed, or is not as it was when it was sealed; the text says what is wrong.
        RollError: it may be whole, and cannot be read by this user, or just now.
    """
    try:
        listed = _listed(folder)
        there = set(files_below(folder)) - {MANIFEST, MARKER}
        if missing := sorted(set(listed) - there):
            raise CheckpointError(f"{show_value(missing[0])} is not there")
        if unlisted := sorted(there - set(listed)):
            raise CheckpointError(f"{show_value(unlisted[0])} was not there when it was saved")
        for name, wanted in listed.items():
            size = (folder / name).stat().st_size
            if size != wanted.size:
                raise CheckpointError(f"{show_value(name)} has {size} bytes, and had {wanted.size} when it was saved")
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, found in zip(
                listed, pool.map(lambda name: file_sum(folder / name, keep=False), listed), strict=True
            ):
                if found != listed[name]:
                    raise CheckpointError(f"{show_value(name)} holds something else than when it was saved")
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise RollError(
                f"nothing can be said of the checkpoint {folder}, which cannot be read: {error}\nOnce it can, start "
                "the run again; if it never can, move it away, and the one before it is gone on from"
            ) from error
        raise CheckpointError(f"it cannot be read: {error}") from error


def _listed(folder: Path) -> dict[str, FileSum]:
    """What the list says; it is not looked at unless the marker seals it."""
    marker, path = folder / MARKER, folder / MANIFEST
    for file, missing in ((marker, "it was not completed: it has no marker"), (path, f"it has no {MANIFEST}")):
        try:
            os.stat(file)
        except FileNotFoundError as error:
            raise CheckpointError(missing) from error
    text, sealed = read_at_most(path, _MAX_MANIFEST), read_at_most(marker, _MAX_MARKER)
    if hashlib.sha256(text).hexdigest() != sealed.decode(errors="replace").strip():
        raise CheckpointError(f"{MANIFEST} is not the one that the marker seals")
    try:
        files = _Manifest.model_validate_json(text).files
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is no list of files: {readable(error)}") from error
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or "\0" in name or "\\" in name:
            raise CheckpointError(f"{MANIFEST} names {show_value(name)!r}, which is no path within the checkpoint")
    return files


def write_durably(path: Path, text: str) -> None:
    """Write a file and have the disk keep it."""
    with naming(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(folder: Path) -> None:
    """Have the disk keep the names in a directory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
