"""The driver's log, which may lie on a disk that fills up: that is said once, and no line of the log is worth a run."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from roll_r3.config.writing import explain

logger = logging.getLogger(__name__)


class RunLog(logging.FileHandler):
    """Appends to a file. Lines that the disk does not take are tried again with the next one."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            say: is told of the first line that could not be written.
        """
        super().__init__(path)
        self._say = say
        self._said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  as the base class has it
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            error.filename = error.filename or self.baseFilename
            self._say(f"the log cannot be written: {explain(error).splitlines()[0]}")


def log_threads() -> None:
    """Log the error that ends a thread, instead of a traceback on the terminal.

    TensorBoard's writer ends with an error of the disk. It raises the same error in the main thread, which names it.
    """

    def ended(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit and args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "a thread"
            logger.error("%s ended", name, exc_info=args.exc_value)

    threading.excepthook = ended
