"""Summary printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from roll_r3.tracking.progress import format_seconds

WINDOW = 5
"""Number of steps averaged for "first" and "last": the mean reward of one step is noisy."""


REWARD = "critic/score/mean"
FIGURES = {
    "router_replay/coverage": "coverage",
    "router_replay/missing_rows": "missing rows",
    "router_replay/agreement_native": "agreement of the live router",
    "router_replay/bytes_per_token": "bytes per token",
    "actor/rollout_train_logprobs_abs_diff_mean": "mean |log p_trainer - log p_rollout|",
    "rollout_corr/k3_kl": "k3 KL(rollout || trainer)",
    "router_replay/time_share": "share of step time on routes",
}
"""Metric -> label in the summary. The summary has these and `REWARD`."""


def summarised(row: Mapping[str, float]) -> dict[str, float]:
    """Select a step's metrics for the summary."""
    return {name: row[name] for name in (REWARD, *FIGURES) if name in row}


class Sample(Protocol):
    """Sampled response as text."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def ground_truth(self) -> str: ...
    @property
    def score(self) -> float: ...


def window_mean(history: Sequence[Mapping[str, float]], name: str, *, end: bool) -> float | None:
    """Average a metric over the first or last `WINDOW` of its steps."""
    values = [row[name] for row in history if name in row]
    if not values:
        return None
    chosen = values[-WINDOW:] if end else values[:WINDOW]
    return sum(chosen) / len(chosen)


def run_summary(
    run_dir: Path,
    history: Sequence[Mapping[str, float]],
    before: Sequence[Sample],
    after: Sequence[Sample],
    *,
    replay_mode: str,
    seconds: float,
) -> str:
    """Format the summary as plain text: directory, rewards, replay, samples."""
    steps = len(history)
    lines = ["", f"finished {steps} steps in {format_seconds(seconds)}", f"run directory   {run_dir}"]
    start, finish = (window_mean(history, REWARD, end=e) for e in (False, True))
    if start is not None and finish is not None:
        shown = min(WINDOW, steps)
        lines.append(f"mean reward     {start:.3f} (first {shown} steps) -> {finish:.3f} (last {shown} steps)")
    lines.append(f"router replay   {replay_mode}")
    for name, label in FIGURES.items():
        values = [row[name] for row in history if name in row]
        if values:
            mean = sum(values) / len(values)
            lines.append(f"  {label:<38}{mean:<12.5g}(lowest {min(values):.5g}, highest {max(values):.5g})")
    for title, samples in (("first step", before), ("last step", after)):
        if samples:
            lines.append(f"samples of the {title}")
            lines += [
                f"  {s.prompt[-60:]!r} -> {s.response[:60]!r}  wanted {s.ground_truth!r}, reward {s.score:g}"
                for s in samples
            ]
    lines.append(f"curves          tensorboard --logdir {run_dir}")
    return "\n".join(lines)
