"""ROLL's defaults where roll_r3 has others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roll_r3.config.devices import parse_devices
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.tables.validation import evaluates

DEFAULTS: dict[str, Any] = {
    "device_type": "cuda",
    "num_return_sequences_in_group": 1,
    "loss_agg_mode": "seq-mean-token-mean",
    "actor_train.training_args.learning_rate": 5e-5,
    "actor_train.training_args.lr_scheduler_type": "linear",
    "actor_train.training_args.adam_beta2": 0.999,
    "actor_train.training_args.per_device_train_batch_size": 8,
    "actor_infer.generating_args.temperature": 0.95,
    "actor_infer.generating_args.top_p": 0.7,
    "actor_infer.generating_args.top_k": 50,
}
_NODE = 8
"""Default number of devices per node."""


def _on_several_nodes(draft: Draft) -> bool:
    """Return true if an engine of a server is on another node than the trainer's first rank."""
    size = draft.get("num_gpus_per_node")
    size = size if isinstance(size, int) and size > 0 else _NODE
    try:
        roles = [parse_devices(draft.get(f"{role}.device_mapping")) for role in ("actor_train", "actor_infer")]
    except ValueError:
        return False
    if draft.strategy("actor_infer") not in ("sglang", "vllm") or not all(isinstance(d, list) and d for d in roles):
        return False
    devices = [device for role in roles for device in role]
    return all(isinstance(d, int) for d in devices) and len({d // size for d in devices}) > 1


def _by_domain(draft: Draft) -> bool:
    """Return true if rows reach a reward by ROLL's column `domain` alone, with the reward's name."""
    rewards = draft.get("rewards")
    return not draft.tagged and isinstance(rewards, dict) and len(rewards) > 1


def _evaluates_tags(draft: Draft) -> bool:
    return draft.tagged and evaluates(draft)


def _evaluates_domains(draft: Draft) -> bool:
    return _by_domain(draft) and evaluates(draft)


CONDITIONAL: tuple[tuple[str, Any, str, Callable[[Draft], bool]], ...] = (
    ("kl_loss_coef", 0, "with use_kl_loss", lambda draft: draft.get("use_kl_loss") is True),
    ("init_kl_coef", 0.2, "with add_token_level_kl", lambda draft: draft.get("add_token_level_kl") is True),
    ("actor_train.data_args.domain", "tag", "where a reward has tags", lambda draft: draft.tagged),
    ("actor_train.data_args.domain", "domain", "where no reward of several has tags", _by_domain),
    ("validation.data_args.domain", "tag", "with validation, where a reward has tags", _evaluates_tags),
    ("validation.data_args.domain", "domain", "with validation, where none has", _evaluates_domains),
    ("eval_steps", 10, "with validation", evaluates),
    ("validation.generating_args.temperature", 0.95, "with validation", evaluates),
    ("validation.generating_args.top_p", 0.7, "with validation", evaluates),
    ("validation.generating_args.top_k", 50, "with validation", evaluates),
    ("norm_mean_type", None, "with reinforce", lambda draft: draft.get("adv_estimator") == "reinforce"),
    (
        "actor_infer.strategy_args.strategy_config.host",
        "0.0.0.0",
        "for engines and a trainer on several nodes",
        _on_several_nodes,
    ),
    (
        "actor_train.strategy_args.strategy_config.recompute",
        True,
        "where FSDP2 trains",  # Megatron has recompute_granularity, in ROLL too
        lambda draft: draft.strategy("actor_train") == "fsdp2_train",
    ),
)
"""(path, default, condition in words, condition) of each default read under a condition only."""


def fill_in_defaults(draft: Draft) -> None:
    """Set ROLL's defaults for fields missing from a file written for ROLL."""
    if draft.is_rolls:
        draft.fill_in(DEFAULTS | {path: value for path, value, _, applies in CONDITIONAL if applies(draft)})
