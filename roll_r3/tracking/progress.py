"""Progress display of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

SHOWN = {
    "reward": "critic/score/mean",
    "|dlogp|": "actor/rollout_train_logprobs_abs_diff_mean",
    "coverage": "router_replay/coverage",
    "agree": "router_replay/agreement_native",
    "grad": "actor_train/grad_norm",
}
"""Heading -> metric, in the order of the columns."""
_RECENT = 10
"""Number of recent steps averaged for the remaining time."""


def format_seconds(seconds: float) -> str:
    """Format a duration: 95 -> "1:35", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _LossyStream:
    """Stream whose reader may disappear, such as a closed terminal; later output is dropped without an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        self._guarded(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def _guarded(self, act: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            act()
        except OSError as error:
            self.lost = True
            logger.warning("terminal lost (%s); progress continues in this log", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """Display of stage, step, rates and remaining time; after the loss of the terminal its lines are logged."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = _LossyStream(stream or sys.stderr)
        # it passes on all attributes of its stream
        self._console = Console(file=cast(TextIO, self._stream), highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._step_times: deque[float] = deque(maxlen=_RECENT)
        self._done = 0
        """Last finished step."""
        self._stage = ""
        self._stage_started = 0.0
        self._step = 0
        self._header_shown = False

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(Text(text))
        if self._stream.lost:
            logger.info("%s", text)

    @contextmanager
    def stage(self, name: str, step: int = 0) -> Iterator[None]:
        """Show `name` while the block runs. Outside a terminal only stages before the first step are printed.

        All stages are logged, so that the last line of the log shows where a run hangs or was killed.
        """
        logger.info("step %d: %s", step, name) if step else logger.info("%s", name)
        self._stage, self._stage_started, self._step = name, time.monotonic(), step
        if self._live is None and step == 0:
            self.say(f"{name} ...")
        try:
            yield
        finally:
            self._stage = ""

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one line of figures."""
        self._done = step
        self._step_times.append(metrics["time/step_total"])
        if not self._header_shown:
            self._header_shown = True
            heads = "".join(f"{head:>11}" for head in SHOWN)
            self.say(f"{'step':>9}{heads}{'tokens/s':>11}{'s/step':>9}{'left':>9}")
        cells = "".join(f"{_cell(metrics.get(name)):>11}" for name in SHOWN.values())
        rate, seconds = metrics["system/tps"], metrics["time/step_total"]
        self.say(f"{step:>4}/{self._total:<4}{cells}{rate:>11.0f}{seconds:>9.2f}{self._left():>9}")

    def _left(self) -> str:
        recent = self._step_times
        return format_seconds((self._total - self._done) * sum(recent) / len(recent)) if recent else "?"

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        if self._stage:
            where = f"step {self._step}/{self._total}" if self._step else "starting"
            spent = format_seconds(time.monotonic() - self._stage_started)
            left = f"about {self._left()} left" if self._step_times else ""
            grid.add_row(Text(where, style="bold"), Text(self._stage, style="cyan"), Text(spent), Text(left))
        return grid


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e6:  # as many digits as there is room for
        return f"{value:.2g}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
