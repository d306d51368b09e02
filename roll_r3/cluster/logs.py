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

    Its directory is made where it is not: on a node that does not see the driver's disk it is a directory of that node.
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
    """The last lines of a log, for a person to see why its process failed."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(its log {path} cannot be read: {error})"
    return f"--- end of {path}\n" + "\n".join(lines[-SHOWN_LINES:]) + "\n---"
