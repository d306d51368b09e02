"""Functions shared by the main programs of child processes.

Uses the standard library only: servers load this file by path, under interpreters without roll_r3.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

FOLDER_VARIABLE = "ROLL_R3_SERVER_FOLDER"
"""Environment variable of a server with its private directory, removed when the server ends."""


def leave_folder(program: str) -> None:
    """Remove a program's folder from the import path, so that its modules shadow no others."""
    folder = os.path.dirname(os.path.abspath(program))
    sys.path[:] = [entry for entry in sys.path if entry != folder]


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent dies.

    Linux only; on other systems this process outlives a killed parent.

    Args:
        parent: id of the expected parent; if it is gone already, this process exits at once.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        sys.exit(f"the parent process {parent} is gone")


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process for the block's time."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
