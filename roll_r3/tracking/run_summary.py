"""Summary printed at the end of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from roll_r3.tracking.progress import format_seconds

WINDOW = 5
"""Number of steps averaged for "first" and "last": the mean reward of one step is noisy."""


_SCORE = re.compile(r"val/[^/]+/\w+@\d+")
"""Names of the scores of whole sets."""
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
    evaluations: Mapping[int, Mapping[str, float]] | None = None,
    replay_mode: str,
    seconds: float,
) -> str:
    """Format the summary as plain text: directory, rewards, evaluation, replay, samples.

    Args:
        evaluations: step -> scores of the evaluation after it.
    """
    steps = len(history)
    lines = ["", f"finished {steps} steps in {format_seconds(seconds)}", f"run directory   {run_dir}"]
    start, finish = (window_mean(history, REWARD, end=e) for e in (False, True))
    if start is not None and finish is not None:
        shown = min(WINDOW, steps)
        lines.append(f"mean reward     {start:.3f} (first {shown} steps) -> {finish:.3f} (last {shown} steps)")
    lines += _first_and_last(evaluations or {})
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


def _first_and_last(evaluations: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    """Yield a line for each score of a set, in the first and the last evaluation."""
    if not evaluations:
        return
    first, last = min(evaluations), max(evaluations)
    yield f"evaluation      after step {first} -> after step {last}"
    for name in _by_set(name for name in evaluations[last] if _SCORE.fullmatch(name)):
        before = evaluations[first].get(name)
        shown = "?" if before is None else f"{before:.4f}"
        yield f"  {name.removeprefix('val/'):<38}{shown} -> {evaluations[last][name]:.4f}"


def _by_set(names: Iterable[str]) -> list[str]:
    """Return names of scores, those of one set together."""
    return sorted(names, key=lambda name: name.split("/")[1])


def evaluation_table(metrics: Mapping[str, float]) -> str:
    """Format the metrics of one evaluation as plain text, one per line."""
    names = _by_set(name for name in metrics if name.startswith("val/"))
    width = max(map(len, names), default=0)
    return "\n".join(f"  {name:<{width}}  {metrics[name]:.6g}" for name in names)
