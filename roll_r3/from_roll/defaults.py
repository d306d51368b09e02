"""ROLL's defaults where roll_r3 has others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roll_r3.from_roll.draft import Draft

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
CONDITIONAL: tuple[tuple[str, Any, str, Callable[[Draft], bool]], ...] = (
    ("kl_loss_coef", 0, "with use_kl_loss", lambda draft: draft.get("use_kl_loss") is True),
    ("init_kl_coef", 0.2, "with add_token_level_kl", lambda draft: draft.get("add_token_level_kl") is True),
    ("actor_train.data_args.domain", "tag", "where a reward has tags", lambda draft: draft.tagged),
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
