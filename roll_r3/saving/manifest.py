"""Manifest of a directory: the list of its files with checksums, sealed by a marker file.

The checksums detect damage, not tampering: anybody with write access can recompute them. So nothing read from a
checkpoint is ever executed: it holds safetensors, JSON and YAML alone.
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

from roll_r3.config.findings.readable import printable, readable
from roll_r3.config.findings.report import show_value
from roll_r3.config.findings.write_errors import with_filename
from roll_r3.config.reading.disk import read_at_most
from roll_r3.errors import CheckpointError, RollError

MANIFEST, MARKER = "manifest.json", "complete"
_CHUNK = 8 << 20
_MAX_MANIFEST = 256 << 20
_MAX_MARKER = 1024
_MAX_DEPTH = 64
"""Maximum depth of directories; a checkpoint has two."""
_THREADS = 8
EVERY_NODE = "every node must see the directory of checkpoints: checkpoint_config.output_dir, or output_dir"
_NOT_DAMAGE = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
        # errors of network file systems; a soft mount of NFS reports EIO too
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
"""Errors of reading that say nothing about the file: missing permission, or a temporary fault."""


@dataclass(frozen=True)
class FileSum:
    """Size and checksum of a file."""

    size: NonNegativeInt
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    files: dict[str, FileSum]


def file_sum(path: Path, *, sync: bool = True) -> FileSum:
    """Compute size and checksum of a file.

    Args:
        sync: also sync the file to disk, as it was just written.

    Raises:
        OSError: the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(stream.fileno())
    return FileSum(size, digest.hexdigest())


def files_below(folder: Path) -> list[str]:
    """List all files below `folder`, as sorted relative paths.

    Raises:
        CheckpointError: an entry is neither a file nor a directory; a link may lead anywhere.
        OSError: a directory cannot be read.
    """
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def _walk(folder: Path, depth: int = 0) -> Iterator[Path]:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{printable(str(folder))} is nested {depth} directories deep")
    for entry in os.scandir(folder):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(Path(entry.path), depth + 1)
        elif stat.S_ISREG(mode):
            yield Path(entry.path)
        else:
            raise CheckpointError(f"{printable(entry.path)} is neither a file nor a directory")


def seal(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest and, last, the marker.

    Args:
        sums: relative path -> checksum, for every file below `folder`.

    Raises:
        CheckpointError: `sums` does not list exactly the existing files.
        OSError: the files cannot be written.
    """
    if differing := set(files_below(folder)) ^ set(sums):
        names = sorted(differing)
        raise CheckpointError(
            f"in {folder} {show_value(names[0])} is missing, or was written by another process "
            f"({len(names)} such files; {EVERY_NODE})"
        )
    text = _Manifest(format=1, files=dict(sorted(sums.items()))).model_dump_json(indent=1) + "\n"
    write_durably(folder / MANIFEST, text)
    write_durably(folder / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")
    for directory in {folder, *(path.parent for path in _walk(folder))}:
        sync_directory(directory)


def verify(folder: Path) -> None:
    """Check every file of a sealed directory against the manifest.

    Raises:
        CheckpointError: the directory is incomplete or damaged; the text names the fault.
        RollError: the directory cannot be read by this user, or at present, and may be intact.
    """
    try:
        listed = _listed(folder)
        there = set(files_below(folder)) - {MANIFEST, MARKER}
        if missing := sorted(set(listed) - there):
            raise CheckpointError(f"{show_value(missing[0])} is missing")
        if unlisted := sorted(there - set(listed)):
            raise CheckpointError(f"{show_value(unlisted[0])} was not there when it was saved")
        for name, wanted in listed.items():
            size = (folder / name).stat().st_size
            if size != wanted.size:
                raise CheckpointError(f"{show_value(name)} has {size} bytes, and had {wanted.size} when it was saved")
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, found in zip(
                listed, pool.map(lambda name: file_sum(folder / name, sync=False), listed), strict=True
            ):
                if found != listed[name]:
                    raise CheckpointError(f"{show_value(name)} does not match its checksum")
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise RollError(
                f"cannot check the checkpoint {folder}, as it cannot be read now: {error}\nStart the run again once it "
                "is readable, or move it away to resume from the checkpoint before it"
            ) from error
        raise CheckpointError(f"it cannot be read: {error}") from error


def _listed(folder: Path) -> dict[str, FileSum]:
    """Read the manifest, after checking its checksum in the marker."""
    marker, path = folder / MARKER, folder / MANIFEST
    for file, missing in ((marker, "it was not completed: it has no marker"), (path, f"it has no {MANIFEST}")):
        try:
            os.stat(file)
        except FileNotFoundError as error:
            raise CheckpointError(missing) from error
    text, sealed = read_at_most(path, _MAX_MANIFEST), read_at_most(marker, _MAX_MARKER)
    if hashlib.sha256(text).hexdigest() != sealed.decode(errors="replace").strip():
        raise CheckpointError(f"{MANIFEST} does not match the marker")
    try:
        files = _Manifest.model_validate_json(text).files
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is not a list of files: {readable(error)}") from error
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or "\0" in name or "\\" in name:
            raise CheckpointError(f"{MANIFEST} names {show_value(name)!r}, not a path within the checkpoint")
    return files


def write_durably(path: Path, text: str) -> None:
    """Write a file and sync it to disk."""
    with with_filename(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(folder: Path) -> None:
    """Sync the names in a directory to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with with_filename(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
