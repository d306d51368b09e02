"""ROLL's defaults where roll_r3 has others."""

from __future__ import annotations

from typing import Any

from roll_r3.config.roll_yaml.draft import Draft

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
KL_LOSS_COEF = {"kl_loss_coef": 0}
"""Read with use_kl_loss only."""
INIT_KL_COEF = {"init_kl_coef": 0.2}
"""Read with add_token_level_kl only."""
DOMAIN = {"actor_train.data_args.domain": "tag"}
"""Read where a reward has tags only."""

RECOMPUTE = {"actor_train.strategy_args.strategy_config.recompute": True}
"""Read where FSDP2 trains only: Megatron has recompute_granularity, in ROLL too."""


def fill_in_defaults(draft: Draft) -> None:
    """What a file that was written for ROLL means by what it leaves out."""
    if not draft.is_rolls:
        return
    kl = KL_LOSS_COEF if draft.get("use_kl_loss") is True else {}
    penalty = INIT_KL_COEF if draft.get("add_token_level_kl") is True else {}
    domain = DOMAIN if draft.tagged else {}
    recompute = RECOMPUTE if draft.strategy("actor_train") == "fsdp2_train" else {}
    draft.fill_in(DEFAULTS | kl | penalty | domain | recompute)
