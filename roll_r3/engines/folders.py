"""Directory of each server, and removal of directories and shared memory after their owners were killed.

The name of a directory identifies its owner. Temporary directories may be on a disk shared by several machines or
containers, and a process id is valid on one of them only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from hashlib import blake2s
from pathlib import Path

import psutil

from roll_r3.engines import segments

_BEGIN = "roll_r3-server-"
"""Start of the names; the machine and the process id follow."""
_HELD = "shared_memory"
"""File in such a directory with the names of the server's shared memory, for removal after a kill."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Random id of each start of the kernel; containers see the id of their machine."""
_NAMESPACE = Path("/proc/self/ns/pid")
"""Namespace of process ids. The initial one has the same number on every Linux machine."""


def make() -> Path:
    """Create a directory closed to other users.

    Raises:
        OSError: no space left.
    """
    return Path(tempfile.mkdtemp(prefix=f"{_BEGIN}{here() or 'somewhere'}-{os.getpid()}-"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def note(folder: Path, held: Iterable[str]) -> None:
    """Record a server's shared memory, in one atomic write: half a name could be the name of another's."""
    text = "\n".join(sorted(held))
    with contextlib.suppress(OSError):  # a full disk: the file is only needed if this process is killed
        new = folder / f"{_HELD}.new"
        new.write_bytes(os.fsencode(text))
        new.replace(folder / _HELD)


def remove_orphaned() -> None:
    """Remove directories and shared memory of servers with killed owners.

    Only those made here since the start of this machine are removed; none if it is unknown. Those of other users
    cannot be removed, and are skipped.
    """
    if not (place := here()):
        return
    own = f"{_BEGIN}{place}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{own}*"):
        maker = re.match(r"([0-9]{1,9})-", folder.name.removeprefix(own))  # any user may create others
        with contextlib.suppress(OSError):  # another process may remove them at the same time
            if maker and not psutil.pid_exists(int(maker[1])) and folder.lstat().st_uid == os.getuid():
                if (folder / _HELD).is_file():
                    segments.remove(os.fsdecode((folder / _HELD).read_bytes()).splitlines())
                remove(folder)


def here() -> str:
    """Return an id of the scope in which process ids are unique: one start of one machine, and one namespace.

    Empty if it is unknown.
    """
    try:
        boot, namespace = _BOOT.read_bytes().strip(), _NAMESPACE.stat().st_ino
    except OSError:
        return ""
    # short: sockets of some engines must not have long paths
    return blake2s(boot + b" %d" % namespace, digest_size=6).hexdigest() if boot else ""
