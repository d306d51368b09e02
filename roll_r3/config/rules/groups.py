"""Choice of a step's groups: filters, additional prompts, shares of sections."""

from __future__ import annotations

from collections.abc import Iterator

from roll_r3.config.derived import changed, filters_groups, server
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread
from roll_r3.config.sections import GroupFilter
from roll_r3.config.shares import section_sizes

SHARES = "actor_train.data_args.domain_interleave_probs"
_FILTERS = ("filter_groups", "rewards.*.filter_groups")
_TWO = "rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}"
_TAGGED = "actor_train.data_args={file_name: prompts.jsonl, domain: tag, domain_interleave_probs: {a: 0.5, b: 0.5}}"
_OF_ONE = ("num_return_sequences_in_group=1", "adv_estimator=reinforce")
_TOLERANCE = 0.01


def _filters(config: RLVRConfig) -> Iterator[tuple[str, GroupFilter]]:
    """Yield every filter with its path."""
    yield "filter_groups", config.filter_groups
    for name, reward in config.rewards.items():
        if reward.filter_groups is not None:
            yield f"rewards.{name}.filter_groups", reward.filter_groups


def _enabled(config: RLVRConfig) -> Iterator[tuple[str, GroupFilter]]:
    return ((path, found) for path, found in _filters(config) if found.enable)


def _unread_fields(config: RLVRConfig) -> Verdict:
    read = {"std": {"enable", "kind", "low"}, "mean": {"enable", "kind", "low", "high"}}
    own = bool(config.rewards) and all(reward.filter_groups is not None for reward in config.rewards.values())
    return ", ".join(
        f"{path}.{name}"
        for path, found in _filters(config)
        for name in ("enable", "kind", "low", "high")
        if changed(config, f"{path}.{name}")
        and not (found.enable and name in read[found.kind] and not (own and path == "filter_groups"))
    )


def _drops_nothing(config: RLVRConfig) -> Verdict:
    return ", ".join(path for path, found in _enabled(config) if found.kind == "std" and found.low < 0)


def _drops_everything(config: RLVRConfig) -> Verdict:
    return ", ".join(path for path, found in _enabled(config) if found.kind == "mean" and found.low >= found.high)


def _groups_of_one(config: RLVRConfig) -> Verdict:
    one = config.num_return_sequences_in_group == 1
    return ", ".join(path for path, found in _enabled(config) if one and found.kind == "std")


def _unknown_sections(config: RLVRConfig) -> Verdict:
    shares = config.actor_train.data_args.domain_interleave_probs
    return ", ".join(name for name in shares if name not in config.rewards)


def _wrong_sum(config: RLVRConfig) -> Verdict:
    shares = config.actor_train.data_args.domain_interleave_probs
    total = sum(shares.values())
    if not shares:
        return False
    if abs(total - 1) > _TOLERANCE or min(section_sizes(shares, config.rollout_batch_size).values()) < 0:
        return f"they sum to {total:g}"
    return False


def _empty_sections(config: RLVRConfig) -> Verdict:
    shares = config.actor_train.data_args.domain_interleave_probs
    if not shares or _wrong_sum(config):
        return False
    sizes = section_sizes(shares, config.rollout_batch_size)
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size < 1)


def _one_domain(config: RLVRConfig) -> Verdict:
    args = config.actor_train.data_args
    return len(args.domain_interleave_probs) > 1 and args.domain is None


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="filter-fields-unread",
        fields=_FILTERS,
        why="these settings of a filter of groups have no effect: the filter is off, its kind does not read them, or "
        "every section of rewards has a filter of its own",
        fix="write enable: true, or leave them out (`high` belongs to kind: mean)",
        wrong=("filter_groups={kind: mean, low: 0.1}",),
        right=("filter_groups={enable: true, kind: mean, low: 0.1}",),
        violates=_unread_fields,
    ),
    unread(
        "filter-bound-unread",
        "filter_groups.max_num_gen_batches",
        "filter_groups.enable",
        filters_groups,
        "write enable: true, here or in a section of rewards, or leave it out",
        wrong=("filter_groups.max_num_gen_batches=3",),
        right=("filter_groups={enable: true, max_num_gen_batches: 3}",),
        depends=("rewards",),
    ),
    Rule(
        id="filter-drops-something",
        fields=_FILTERS,
        why="a standard deviation is never below 0: this filter keeps every group",
        fix="write low: 0, or leave the filter out",
        wrong=("filter_groups={enable: true, low: -1}",),
        right=("filter_groups={enable: true, low: 0.1}",),
        violates=_drops_nothing,
    ),
    Rule(
        id="filter-keeps-something",
        fields=_FILTERS,
        why="no mean lies between these bounds: every group is dropped",
        fix="write low < high",
        wrong=("filter_groups={enable: true, kind: mean, low: 1}",),
        right=("filter_groups={enable: true, kind: mean, low: -1}",),
        violates=_drops_everything,
    ),
    Rule(
        id="filter-needs-groups",
        fields=("num_return_sequences_in_group", *_FILTERS),
        why="one score has no standard deviation: the filter drops every group",
        fix="write kind: mean, or num_return_sequences_in_group: 2 or more",
        wrong=(*_OF_ONE, "filter_groups.enable=true"),
        right=(*_OF_ONE, "filter_groups={enable: true, kind: mean}"),
        violates=_groups_of_one,
    ),
    Rule(
        id="additional-prompts-save-time",
        fields=("max_additional_running_prompts", "actor_infer.strategy_args.strategy_name"),
        why="hf_infer answers batch after batch: no group finishes before the others of its batch, and additional "
        "prompts save no time",
        fix="write max_additional_running_prompts: 0, or another engine",
        wrong=("actor_infer.strategy_args={strategy_name: hf_infer}", "max_additional_running_prompts=4"),
        right=("max_additional_running_prompts=4",),
        violates=lambda c: c.max_additional_running_prompts > 0 and server(c) is None,
        severity="warning",
    ),
    Rule(
        id="shares-of-known-sections",
        fields=(SHARES, "rewards"),
        why="a share belongs to a section of rewards, by its name",
        fix="write names of sections (a domain of the data is named in a section's tag_included)",
        wrong=(_TWO, _TAGGED.replace("b: 0.5", "c: 0.5")),
        right=(_TWO, _TAGGED),
        violates=_unknown_sections,
    ),
    Rule(
        id="shares-sum-to-one",
        fields=(SHARES,),
        why="the shares of a step's prompts must sum to 1",
        fix="correct them; the last section gets the rest of the prompts in any case",
        wrong=(_TWO, _TAGGED.replace("b: 0.5", "b: 0.4")),
        right=(_TWO, _TAGGED),
        violates=_wrong_sum,
    ),
    Rule(
        id="shares-give-prompts",
        fields=(SHARES, "rollout_batch_size"),
        why="these sections get no prompt in any step: int(share x rollout_batch_size), and the rest for the last",
        fix="leave them out, or raise their share or rollout_batch_size",
        wrong=("rollout_batch_size=16", _TWO, _TAGGED.replace("a: 0.5, b: 0.5", "a: 0.01, b: 0.99")),
        right=("rollout_batch_size=16", _TWO, _TAGGED.replace("a: 0.5, b: 0.5", "a: 0.1, b: 0.9")),
        violates=_empty_sections,
        severity="warning",
    ),
    Rule(
        id="shares-need-domains",
        fields=(SHARES, "actor_train.data_args.domain"),
        why="without a domain column every prompt belongs to the one section that scores the domain `default`",
        fix="name the column in actor_train.data_args.domain",
        wrong=(_TWO, _TAGGED.replace(", domain: tag", "")),
        right=(_TWO, _TAGGED),
        violates=_one_domain,
    ),
)
