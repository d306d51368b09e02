"""Corrections between rollout and trainer: ROLL's section, and its older flat keys."""

from __future__ import annotations

from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Row, Step, Unread

_CORRECTION = "rollout_correction"
_SECTION = "train_infer_correction"
_WEIGHT = f"{_SECTION}.is_weight"
_FILTERS = f"{_SECTION}.filters"
_FLAT_WEIGHT = "use_rollout_importance_sampling_ratio"
_FLAT_BOUND = "rollout_importance_sampling_ratio_upper_bound"
_BOUND = 1.2
"""ROLL's default bound on the weights."""
_LEVELS = {"token": "token", "geometric": "geometric", "sequence": "sequence", "segment": "geometric"}
"""ROLL's levels -> roll_r3's. A segment is one turn, and a response is one segment."""
_BOUNDS = {"ratio": (0.8, 1.2), "diff": (-0.2, 0.2)}
"""ROLL's default bounds of a filter."""
_FLAT_FILTERS = {
    "train_infer_ratio_mask": ("token", "ratio"),
    "train_infer_diff_mask": ("token", "diff"),
    "train_infer_ratio_seq_mask": ("geometric", "ratio"),
    "train_infer_diff_seq_mask": ("geometric", "diff"),
}
"""Older switches -> level and statistic: their sequences are means over a response."""
_THRESHOLDS = tuple(f"{m.removesuffix('_mask')}_threshold_{side}" for m in _FLAT_FILTERS for side in ("low", "high"))
_WHY_WEIGHT = (
    "weights min(pi_old / pi_rollout, bound) on the loss. ROLL itself has the rollout's log-probabilities only with "
    "generating_args.logprobs or asynchronous generation; without them its weights are 1"
)
_WHY_FILTER = "tokens outside the bounds are not trained on, and leave the loss's denominator"


def _weight(draft: Draft) -> None:
    weight = draft.get(_WEIGHT)
    if not isinstance(weight, dict):
        return
    enabled, level = weight.get("enabled", False), weight.get("weight_type", "token")
    if not isinstance(enabled, bool) or (enabled and level not in _LEVELS):
        return  # the section stays, and the models report it
    if enabled:
        _translate_weight(draft, _WEIGHT, _LEVELS[level], weight.get("upper_bound", _BOUND))
    draft.drop(_WEIGHT)
    draft.keep_unknown(_WEIGHT, weight, ("enabled", "weight_type", "upper_bound", "detach"))


def _translate_weight(draft: Draft, path: str, level: str, bound: Any) -> None:
    draft.translate(path, {f"{_CORRECTION}.is_weight": level, f"{_CORRECTION}.is_cap": bound}, _WHY_WEIGHT)


def _filters(draft: Draft) -> None:
    items = draft.get(_FILTERS)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return
    found = [made for item in items if item.get("enabled", False) is not False for made in _filters_of(item)]
    if found:
        draft.translate(_FILTERS, {f"{_CORRECTION}.filters": found}, _WHY_FILTER)
    draft.drop(_FILTERS)


def _filters_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the filters of one item of ROLL, one for each bounded statistic."""
    level = _LEVELS.get(str(item.get("agg_type", "token")), item.get("agg_type"))
    return [
        {
            "level": level,
            "statistic": statistic,
            "low": item.get(f"{statistic}_low", low),
            "high": item.get(f"{statistic}_high", high),
        }
        for statistic, (low, high) in _BOUNDS.items()
        if item.get(f"{statistic}_enabled", statistic == "ratio") is not False
    ]


def _flat(draft: Draft) -> None:
    """Translate ROLL's older keys."""
    if draft.get(_FLAT_WEIGHT) in (False, None):
        draft.drop(_FLAT_WEIGHT)
    elif draft.get(_FLAT_WEIGHT) is True:
        bound = draft.get(_FLAT_BOUND)
        draft.drop(_FLAT_BOUND)
        _translate_weight(draft, _FLAT_WEIGHT, "token", _BOUND if bound is ABSENT else bound)
    on = []
    for switch in _FLAT_FILTERS:
        if draft.get(switch) in (False, None):
            draft.drop(switch)
        elif draft.get(switch) is True:
            on.append(switch)
    found = [_flat_filter(draft, switch) for switch in on]
    for switch in on:
        draft.translate(switch, {f"{_CORRECTION}.filters": found}, _WHY_FILTER)


def _flat_filter(draft: Draft, switch: str) -> dict[str, Any]:
    """Return the filter of an older switch, and drop its thresholds."""
    level, statistic = _FLAT_FILTERS[switch]
    made: dict[str, Any] = {"level": level, "statistic": statistic}
    for side, default in zip(("low", "high"), _BOUNDS[statistic], strict=True):
        path = f"{switch.removesuffix('_mask')}_threshold_{side}"
        made[side] = default if draft.get(path) is ABSENT else draft.get(path)
        draft.drop(path)
    return made


def _empty(draft: Draft) -> None:
    if draft.get(_SECTION) in (None, {}):
        draft.drop(_SECTION)


STEPS: tuple[Step, ...] = (_weight, _filters, _flat, _empty)

ROWS = (
    Row(
        _SECTION,
        ByStep(
            "`is_weight` is `rollout_correction.is_weight` with `is_cap`; each enabled filter is one in "
            "`rollout_correction.filters`, or two if it bounds ratio and difference. `segment` is `geometric`: a "
            "response is one segment"
        ),
    ),
    Row(_FLAT_WEIGHT, ByStep("`rollout_correction.is_weight: token`, with its upper bound as `is_cap`")),
    Row(
        tuple(_FLAT_FILTERS),
        ByStep("`rollout_correction.filters`, with their thresholds; `_seq_` is the mean over a response"),
    ),
    Row((_FLAT_BOUND, *_THRESHOLDS), Unread("read with their switch only")),
)
