"""Rows of the rule table that follow from what strategies declare they can do.

The table's form and the rows about fields alone are in `roll_r3.config.rules`.
"""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import Rule, Verdict, megatron_workers, workers
from roll_r3.strategies.registry import STRATEGIES, StrategyEntry
from roll_r3.strategies.rollout.sglang.server import refused_server_args

_KINDS = {"actor_train": "train", "actor_infer": "rollout", "reference": "infer"}


def entry(config: RLVRConfig, role: str) -> StrategyEntry:
    """The registry's row of the strategy that a configured role runs."""
    return STRATEGIES[_strategy_names(config)[role]]


def _strategy_names(config: RLVRConfig) -> dict[str, str]:
    names = {"actor_infer": config.actor_infer.strategy_args.strategy_name}
    return names | {role: w.strategy_args.strategy_name for role, w in megatron_workers(config).items()}


def _wrong_kind(config: RLVRConfig) -> Verdict:
    wrong = [role for role in workers(config) if entry(config, role).kind != _KINDS[role]]
    return ", ".join(f"{role} needs a {_KINDS[role]} strategy, not a {entry(config, role).kind} one" for role in wrong)


def _rollout_cannot_record(config: RLVRConfig) -> Verdict:
    wanted = config.actor_infer.router_replay.mode == "R3"
    return wanted and not entry(config, "actor_infer").capabilities.records_routes


def _trainer_cannot_replay(config: RLVRConfig) -> Verdict:
    mode, able = config.actor_train.router_replay.mode, entry(config, "actor_train").capabilities.replays
    return f"it replays {', '.join(sorted(able)) or 'nothing'}" if mode not in (*able, "disable") else False


def _cannot_pack(config: RLVRConfig) -> Verdict:
    roles = [role for role, worker in megatron_workers(config).items() if worker.use_sequence_packing]
    return ", ".join(role for role in roles if not entry(config, role).capabilities.packs)


def _refused_server_args(config: RLVRConfig) -> Verdict:
    return "; ".join(refused_server_args(config.actor_infer.strategy_args.strategy_config))


CAPABILITY_RULES: tuple[Rule, ...] = (
    Rule(
        id="strategy-fits-role",
        fields=("*.strategy_args.strategy_name",),
        why="a role runs a strategy of its kind",
        fix="choose another strategy_name",
        violates=_wrong_kind,
    ),
    Rule(
        id="r3-needs-recording-rollout",
        fields=("actor_infer.strategy_args.strategy_name", "actor_infer.router_replay.mode"),
        why="R3 replays the experts that the rollout used, and this rollout strategy does not record them",
        fix="choose a rollout strategy that records routes (sglang), or disable replay on both sides",
        violates=_rollout_cannot_record,
    ),
    Rule(
        id="trainer-replays-mode",
        fields=("actor_train.router_replay.mode", "actor_train.strategy_args.strategy_name"),
        why="this training strategy cannot run that replay mode",
        fix="choose another mode, or another strategy_name",
        violates=_trainer_cannot_replay,
    ),
    Rule(
        id="packing-supported",
        fields=("actor_train.use_sequence_packing", "reference.use_sequence_packing"),
        why="this strategy cannot pack samples into one row",
        fix="write use_sequence_packing: false for the role",
        violates=_cannot_pack,
    ),
    Rule(
        id="sglang-server-args",
        fields=("actor_infer.strategy_args.strategy_config.server_args",),
        why="the strategy owns these arguments, or routes are lost with them",
        fix="take them out",
        violates=_refused_server_args,
    ),
)
