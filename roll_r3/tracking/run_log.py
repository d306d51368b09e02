"""Log of the driver. If its disk fills up, this is reported once, and the run continues."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from roll_r3.config.findings.write_errors import explain

logger = logging.getLogger(__name__)


class RunLog(logging.FileHandler):
    """Handler appending to a file. Lines rejected by the disk are retried with the next line."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            say: receives a message for the first line that cannot be written.
        """
        super().__init__(path)
        self._say = say
        self._reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  as the base class has it
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            error.filename = error.filename or self.baseFilename
            self._say(f"the log cannot be written: {explain(error).splitlines()[0]}")


def log_threads() -> None:
    """Log an error that ends a thread, instead of a traceback on the terminal.

    TensorBoard's writer thread ends with errors of the disk, and raises them in its tracker's thread too, where they
    are reported.
    """

    def ended(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit and args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "a thread"
            logger.error("%s ended", name, exc_info=args.exc_value)

    threading.excepthook = ended
