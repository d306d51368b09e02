"""What the main programs of processes that roll_r3 starts share.

The standard library only: servers load it by path, under interpreters that need not have roll_r3.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

FOLDER_VARIABLE = "ROLL_R3_SERVER_FOLDER"
"""Of a server's environment: a directory that nobody else may look into, and that is removed when the server ends."""


def leave_folder(program: str) -> None:
    """Take a program's folder off the import path: its modules must not shadow others."""
    folder = os.path.dirname(os.path.abspath(program))
    sys.path[:] = [entry for entry in sys.path if entry != folder]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it dies.

    Linux only; elsewhere it outlives a parent that was killed.

    Args:
        parent: the process that should be this one's parent; where it is gone already, this one ends at once.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(f"process {parent} that started this one is gone")
