"""Decision to resume a run that lost a worker."""

from __future__ import annotations

from roll_r3.errors import LostWorkerError


class Recoveries:
    """Counter of attempts without progress."""

    def __init__(self, limit: int, begun: int) -> None:
        """Args:
        limit: number of attempts in a row without progress.
        begun: number of steps done when the run started.
        """
        self._limit = limit
        self._begun = self._furthest = begun
        self.count = 0
        """New starts since the run last got further."""

    def spend(self, error: LostWorkerError, reached: int) -> None:
        """Allow one more attempt.

        Args:
            reached: the last step that is done.

        Raises:
            LostWorkerError: another attempt is useless.
        """
        if not self._limit:
            raise error
        if reached == self._begun and not self.count:
            raise LostWorkerError(
                f"{error}\nthe run had not made a step since it was started, so it does not try again by itself: what "
                "fails that early is a setting more often than a fault"
            ) from error
        if reached > self._furthest:
            self._furthest, self.count = reached, 0
        if self.count == self._limit:
            raise LostWorkerError(
                f"{error}\nthe run did not get past step {self._furthest} in {self._limit} restarts (max_recoveries)"
            ) from error
        self.count += 1
