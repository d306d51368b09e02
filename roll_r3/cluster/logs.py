"""One log file per worker process, and its end for an error message."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SHOWN_LINES = 25


def log_to_file(path: Path) -> None:
    """Send everything this process prints or logs, crashes included, to `path`.

    Its directory is made if there is none: a node without the driver's disk has a directory of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable(2)
    logging.basicConfig(level=logging.INFO, format=FORMAT, stream=sys.stderr, force=True)


def log_end(path: Path) -> str:
    """Return the last lines of a log, for a person to see why its process failed."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(its log {path} cannot be read: {error})"
    return f"--- end of {path}\n" + "\n".join(lines[-SHOWN_LINES:]) + "\n---"
