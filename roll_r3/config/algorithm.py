"""View of the configuration for the algorithms: settings of advantages, aggregation and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roll_r3.config.sections import OverlongBufferConfig, PgArgsConfig, RolloutCorrectionConfig


@dataclass(frozen=True)
class AlgorithmConfig:
    """Settings of the algorithms, under their names in `RLVRConfig`, with the descriptions there.

    Made by `roll_r3.config.derived.algorithm_of`. Defaults live in `RLVRConfig` alone.
    """

    reward_shift: float
    reward_scale: float
    overlong_buffer: OverlongBufferConfig | None
    response_length: int
    adv_estimator: Literal["grpo", "reinforce", "rloo", "reinforce_plus_plus_baseline"]
    norm_adv_by_std_in_grpo: bool
    norm_mean_type: Literal["group", "batch"] | None
    norm_std_type: Literal["group", "batch"] | None
    reward_clip: float | None
    whiten_advantages: bool
    max_len_mask: bool
    difficulty_mask: bool
    difficulty_low_threshold: float
    difficulty_high_threshold: float
    advantage_clip: float | None
    add_token_level_kl: bool
    kl_penalty: Literal["k1", "k2", "abs"]
    init_kl_coef: float

    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
    loss_divisor: float

    pg_variant: Literal["ppo", "vanilla", "tis", "topr", "cispo", "kimi15", "dppo_tv"]
    pg_args: PgArgsConfig
    importance_sampling: Literal["token", "seq"]
    top_entropy_quantile: float
    clip_range: tuple[float, float]
    dual_clip_loss: float | None
    entropy_loss_coef: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_estimator: Literal["k2", "k3"]
    use_unbiased_kl: bool
    rollout_correction: RolloutCorrectionConfig
