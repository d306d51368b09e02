"""The directory that every server has, and what becomes of it, and of shared memory, when all who knew them are killed.

A directory's name says whose it is: temporary directories may lie on a disk that several machines or containers share,
and the number of a process means something on one of them only.
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
"""What the names begin with; where and by which process it was made follow."""
_HELD = "shared_memory"
"""In such a directory: a file that names the shared memory of the server, should nobody who knows it be left."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Drawn anew whenever a kernel starts; containers see that of their machine."""
_NAMESPACE = Path("/proc/self/ns/pid")
"""Of the processes that this one sees. The number of a machine's first one is the same on every Linux."""


def make() -> Path:
    """A new directory that nobody else may look into.

    Raises:
        OSError: there is no room for one.
    """
    return Path(tempfile.mkdtemp(prefix=f"{_BEGIN}{here() or 'somewhere'}-{os.getpid()}-"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def note(folder: Path, held: Iterable[str]) -> None:
    """Write down what a server holds in shared memory, all at once: half a name could be another's."""
    text = "\n".join(sorted(held))
    with contextlib.suppress(OSError):  # a full disk: it is of use only if this process is killed
        new = folder / f"{_HELD}.new"
        new.write_bytes(os.fsencode(text))
        new.replace(folder / _HELD)


def remove_orphaned() -> None:
    """Directories and shared memory of servers whose makers were killed before they could.

    Only what was made here, since this machine was started; nothing where that cannot be told. Another user's cannot
    be removed, and are not tried.
    """
    if not (place := here()):
        return
    own = f"{_BEGIN}{place}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{own}*"):
        maker = re.match(r"([0-9]{1,9})-", folder.name.removeprefix(own))  # anybody may make others
        with contextlib.suppress(OSError):  # another looks after them too
            if maker and not psutil.pid_exists(int(maker[1])) and folder.lstat().st_uid == os.getuid():
                if (folder / _HELD).is_file():
                    segments.remove(os.fsdecode((folder / _HELD).read_bytes()).splitlines())
                remove(folder)


def here() -> str:
    """Where the number of a process names the same one: one start of one machine, and who is seen from this process.
    Empty: it cannot be told."""
    try:
        boot, namespace = _BOOT.read_bytes().strip(), _NAMESPACE.stat().st_ino
    except OSError:
        return ""
    # short, for the sockets of some engines must not have long paths
    return blake2s(boot + b" %d" % namespace, digest_size=6).hexdigest() if boot else ""
