"""Corrections for the difference between rollout and trainer: bounds, filters, bypass."""

from __future__ import annotations

from collections.abc import Callable

from roll_r3.config.derived import gives_rollout_log_probs
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread
from roll_r3.config.sections import CorrectionFilter

_SECTION = "rollout_correction"
_FILTERS = f"{_SECTION}.filters"
_AGREEMENT = {"ratio": 1.0, "diff": 0.0, "k3": 0.0}
"""Value of each statistic where rollout and trainer agree."""


def _of_filters(fault: Callable[[CorrectionFilter], Verdict]) -> Callable[[RLVRConfig], Verdict]:
    """Return a verdict on all filters from the fault of one."""

    def verdict(config: RLVRConfig) -> Verdict:
        faults = [(number, fault(item)) for number, item in enumerate(config.rollout_correction.filters)]
        found = [f"filters[{n}]" if why is True else f"filters[{n}]: {why}" for n, why in faults if why]
        return ", ".join(found)

    return verdict


def _rejects_agreement(item: CorrectionFilter) -> Verdict:
    value, low, high = _AGREEMENT[item.statistic], item.low, item.high
    outside = (low is not None and low > value) or (high is not None and high < value)
    return outside and f"{item.statistic} is {value:g} where they agree"


def _bound_without_effect(item: CorrectionFilter) -> Verdict:
    if item.statistic == "k3":
        return item.low is not None and item.low <= 0 and "k3 is never below 0"
    if item.statistic == "ratio":
        return item.low is not None and item.low <= 0 and "a ratio is never 0 or less"
    if item.level == "sequence":  # a sum of differences has no bound
        return False
    low, high = item.low, item.high
    outside = (low is not None and low <= -1) or (high is not None and high >= 1)
    return outside and "a difference of probabilities is above -1 and below 1"


def _pointless_with_bypass(config: RLVRConfig) -> Verdict:
    correction = config.rollout_correction
    return correction.bypass and correction.corrects


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="correction-cap-in-range",
        fields=(f"{_SECTION}.is_cap", f"{_SECTION}.is_weight"),
        why="where rollout and trainer agree the weight is 1: a cap below 1 truncates it, one above 100 hardly any",
        fix="write a value from 1 to 100 (2 is usual), or null",
        wrong=(f"{_SECTION}={{is_weight: token, is_cap: 0.5}}",),
        right=(f"{_SECTION}={{is_weight: token, is_cap: 1}}",),
        violates=lambda c: (
            c.rollout_correction.is_weight is not None
            and c.rollout_correction.is_cap is not None
            and not 1 <= c.rollout_correction.is_cap <= 100
        ),
    ),
    Rule(
        id="correction-floor-below-one",
        fields=(f"{_SECTION}.is_floor",),
        why="where rollout and trainer agree the weight is 1, and weights below the floor are 0: nothing is learned",
        fix="write a value below 1 (0.5 with is_cap: 5 is IcePop's)",
        wrong=(f"{_SECTION}={{is_weight: token, is_floor: 1}}",),
        right=(f"{_SECTION}={{is_weight: token, is_floor: 0.5, is_cap: 5}}",),
        violates=lambda c: (c.rollout_correction.is_floor or 0) >= 1,
    ),
    Rule(
        id="correction-floor-needs-cap",
        fields=(f"{_SECTION}.is_cap", f"{_SECTION}.is_floor"),
        why="is_floor makes a band of weights, and without is_cap its upper end is open: a huge weight would be kept",
        fix="write is_cap (5 is IcePop's), or leave is_floor out",
        wrong=(f"{_SECTION}={{is_weight: token, is_floor: 0.5, is_cap: null}}",),
        right=(f"{_SECTION}={{is_weight: token, is_cap: null}}",),
        violates=lambda c: c.rollout_correction.is_floor is not None and c.rollout_correction.is_cap is None,
    ),
    Rule(
        id="correction-filter-has-bounds",
        fields=(_FILTERS,),
        why="a filter without low and high keeps everything",
        fix="give it low, high or both",
        wrong=(f"{_FILTERS}=[{{level: token}}]",),
        right=(f"{_FILTERS}=[{{level: token, high: 2}}]",),
        violates=_of_filters(lambda item: item.low is None and item.high is None),
    ),
    Rule(
        id="correction-filter-in-order",
        fields=(_FILTERS,),
        why="no value lies between low and high",
        fix="write low below high",
        wrong=(f"{_FILTERS}=[{{low: 2, high: 0.5}}]",),
        right=(f"{_FILTERS}=[{{low: 0.5, high: 2}}]",),
        violates=_of_filters(lambda i: i.low is not None and i.high is not None and i.low >= i.high),
    ),
    Rule(
        id="correction-filter-keeps-agreement",
        fields=(_FILTERS,),
        why="the filter rejects what rollout and trainer agree on",
        fix="write bounds around 1 for ratio, around 0 for diff, and only high for k3; they are on the statistic, "
        "not on its logarithm",
        wrong=(f"{_FILTERS}=[{{statistic: diff, low: 0.5, high: 2}}]",),
        right=(f"{_FILTERS}=[{{statistic: ratio, low: 0.5, high: 2}}]",),
        violates=_of_filters(_rejects_agreement),
    ),
    Rule(
        id="correction-filter-bound-unread",
        fields=(_FILTERS,),
        why="a bound has no effect",
        fix="leave the bound out, or write one nearer to the value of agreement",
        wrong=(f"{_FILTERS}=[{{statistic: k3, low: 0, high: 0.01}}]",),
        right=(f"{_FILTERS}=[{{statistic: k3, high: 0.01}}]",),
        violates=_of_filters(_bound_without_effect),
        severity="warning",
    ),
    Rule(
        id="bypass-leaves-nothing-to-correct",
        fields=(
            f"{_SECTION}.bypass",
            f"{_SECTION}.is_weight",
            _FILTERS,
            f"{_SECTION}.opsm_delta",
        ),
        why="with bypass the old policy is the rollout's and the ratio 1: weights are 1, and filters keep everything",
        fix="write bypass: false, or leave the corrections out",
        wrong=(f"{_SECTION}={{bypass: true, is_weight: token}}",),
        right=(f"{_SECTION}={{bypass: true}}",),
        violates=_pointless_with_bypass,
    ),
    Rule(
        id="bypass-without-recording",
        fields=(f"{_SECTION}.bypass", "actor_train.router_replay.mode"),
        why="R2 records routes in the pass for old log-probabilities, which bypass leaves out",
        fix="write router_replay.mode: R3, or bypass: false",
        wrong=(
            f"{_SECTION}.bypass=true",
            "actor_train.router_replay.mode=R2",
            "actor_infer.router_replay.mode=disable",
        ),
        right=(f"{_SECTION}.bypass=true",),
        violates=lambda c: c.rollout_correction.bypass and c.actor_train.router_replay.mode == "R2",
    ),
    Rule(
        id="correction-compares-like-with-like",
        fields=(
            _SECTION,
            "actor_infer.generating_args.sampling_mask",
            "actor_infer.generating_args.top_p",
            "actor_infer.generating_args.top_k",
            "actor_infer.strategy_args.strategy_name",
        ),
        why="vLLM's log-probabilities are of the truncated distribution, but the trainer's are of the whole one: their "
        "ratio is too small for every token",
        fix="leave sampling_mask out, or write top_p: 1 and top_k: -1, or no rollout_correction",
        wrong=(
            "actor_infer.strategy_args={strategy_name: vllm}",
            "actor_infer.generating_args={top_k: 50, sampling_mask: false}",
            f"{_SECTION}.is_weight=token",
        ),
        right=("actor_infer.strategy_args={strategy_name: vllm}", f"{_SECTION}.is_weight=token"),
        violates=lambda c: (
            (c.rollout_correction.corrects or c.rollout_correction.bypass) and not gives_rollout_log_probs(c)
        ),
    ),
    Rule(
        id="bypass-without-entropies",
        fields=(f"{_SECTION}.bypass", "top_entropy_quantile"),
        why="top_entropy_quantile reads entropies of the pass for old log-probabilities, which bypass leaves out",
        fix="write top_entropy_quantile: 1, or bypass: false",
        wrong=(f"{_SECTION}.bypass=true", "top_entropy_quantile=0.2"),
        right=(f"{_SECTION}.bypass=true",),
        violates=lambda c: c.rollout_correction.bypass and c.top_entropy_quantile < 1,
    ),
    Rule(
        id="bypass-with-forced-ratio",
        fields=(f"{_SECTION}.bypass", "force_on_policy_ratio"),
        why="bypass makes the ratio policy / rollout, and force_on_policy_ratio would make it 1",
        fix="write force_on_policy_ratio: auto, or bypass: false",
        wrong=(f"{_SECTION}.bypass=true", "force_on_policy_ratio=true", "rollout_batch_size=2"),
        right=(f"{_SECTION}.bypass=true", "force_on_policy_ratio=false"),
        violates=lambda c: c.rollout_correction.bypass and c.force_on_policy_ratio is True,
    ),
    *(
        unread(
            f"correction-{name.removeprefix('is_')}-unread",
            f"{_SECTION}.{name}",
            f"{_SECTION}.is_weight",
            lambda c: c.rollout_correction.is_weight is not None,
            "write is_weight: token, sequence or geometric",
            wrong=(f"{_SECTION}.{name}={value}",),
            right=(f"{_SECTION}={{is_weight: token, {name}: {value}}}",),
        )
        for name, value in (("is_cap", 3), ("is_floor", 0.5))
    ),
)
