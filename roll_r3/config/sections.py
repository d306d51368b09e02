"""Sections of the root that describe no role: corrections, filters, evaluation, checkpoints, limits."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.workers import DataArgs, GeneratingArgs


class GroupFilter(Config):
    """Filter of groups by the scores of their samples."""

    enable: bool = False
    """Filter groups by the scores of their samples."""
    kind: Literal["std", "mean"] = "std"
    """std: keep groups with a standard deviation of scores above `low`. mean: keep groups with low < mean < high."""
    low: float = 0.0
    """Lower bound, excluded."""
    high: float = 1.0
    """Upper bound of the mean, excluded."""


class CorrectionFilter(Config):
    """Filter of tokens or samples by the mismatch between trainer and rollout. Rejected ones leave the loss mask."""

    level: Literal["token", "geometric", "sequence"] = "token"
    """token: each token by its own value. geometric: a sample by the mean over its trained tokens (for `ratio`, the
    geometric mean). sequence: a sample by the sum (for `ratio`, the product)."""
    statistic: Literal["ratio", "diff", "k3"] = "ratio"
    """ratio: pi_old / pi_rollout. diff: pi_old - pi_rollout. k3: ratio - 1 - log ratio, never negative."""
    low: float | None = None
    """Lower bound of kept values, itself kept; default: none."""
    high: float | None = None
    """Upper bound of kept values, itself kept; default: none."""


class PgArgsConfig(Config):
    """Parameters of one policy-gradient loss each, named after its `pg_variant`."""

    tis_lower_bound: NonNegativeFloat = 0.0
    """tis: lower bound of the ratio."""
    tis_upper_bound: PositiveFloat = 1.0
    """tis: upper bound of the ratio."""
    topr_positive_weight: NonNegativeFloat = 1.0
    """topr: weight of samples with a score above 0."""
    topr_negative_weight: NonNegativeFloat = 1.0
    """topr: weight of the other samples."""
    cispo_use_unified_mask: bool = False
    """cispo: leave out the tokens cut by PPO too."""
    kimi15_tau: NonNegativeFloat = 0.1
    """kimi15: weight of the squared log ratio."""
    dppo_max_ratio: PositiveFloat = 20.0
    """dppo_tv: upper bound of the ratio."""


class RolloutCorrectionConfig(Config):
    """Off-policy correction for the remaining difference between rollout and trainer, with ratio = pi_old / pi_rollout
    of each trained token. Weights multiply the policy-gradient loss and carry no gradient; weight 0 stays in its
    denominator. All but `bypass` need a pass of the trainer before the update."""

    bypass: bool = False
    """Use the rollout's log-probabilities as the old ones: two policies instead of three, and no pass for old ones. The
    ratio is then policy / rollout from the first optimizer step on."""
    is_weight: Literal["token", "sequence", "geometric"] | None = None
    """Importance weight of each token: its ratio, the product over its sample, or the geometric mean over its sample.
    Default: none."""
    is_cap: PositiveFloat | None = 2.0
    """Upper bound of the weight; null: none."""
    is_floor: PositiveFloat | None = None
    """With it weights outside [is_floor, is_cap] are 0 (IcePop), instead of truncated at is_cap."""
    filters: tuple[CorrectionFilter, ...] = ()
    """Filters, all of which a token must pass."""
    opsm_delta: PositiveFloat | None = None
    """Off-policy sequence masking (DeepSeek-V3.2): samples with a negative advantage and a mean of
    log pi_rollout - log pi_old above this have weight 0. The denominator keeps them."""

    @property
    def corrects(self) -> bool:
        """True if old log-probabilities are compared with the rollout's."""
        return self.is_weight is not None or bool(self.filters) or self.opsm_delta is not None


class FilterGroupsConfig(GroupFilter):
    """Dynamic sampling (DAPO, arXiv 2503.14476): only groups with a learning signal are trained on, and more prompts
    are sampled until the step is full."""

    max_num_gen_batches: PositiveInt = 10
    """Largest number of prompts sampled for a step, in multiples of rollout_batch_size. Then the step trains on the
    groups found so far."""


class OverlongBufferConfig(Config):
    """Soft penalty of long responses (DAPO, arXiv 2503.14476)."""

    len: PositiveInt
    """Number of tokens before response_length over which the penalty grows from 0 to penalty_factor."""
    penalty_factor: PositiveFloat = 1.0
    """Penalty at response_length, subtracted from the score."""


class ValidationConfig(Config):
    """Evaluation on prompts of its own."""

    data_args: DataArgs
    """Prompts. Each file is a set of its own in the metrics."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling settings, independent of training's."""
    val_n_sample: PositiveInt = 1
    """Responses per prompt."""
    val_greedy: bool = False
    """Take the likeliest token each time; needs val_n_sample: 1."""
    eval_at_start: bool = True
    """Evaluate before the first step too."""


class CheckpointConfig(Config):
    """Location and mode of writing checkpoints."""

    output_dir: str | None = None
    """Checkpoints go to `output_dir/exp_name/<run>/checkpoints/`, weights for transformers to `<run>/hf/`, on a disk
    shared by all nodes. Default: the run's `output_dir`."""
    async_save: bool = False
    """Continue training during a write. The run waits only for the previous write and for each rank's copy to host
    memory."""


class WorkerTimeoutsConfig(Config):
    """Limits of waiting for a worker: a training or reference rank, or the worker of an engine. Past a limit its
    process is killed and the run restarts from its newest checkpoint. The terminal names slow workers earlier."""

    stopped: Seconds | None = 120.0
    """Seconds for which a worker's process, or a Ray process on the driver's node, may be stopped (SIGSTOP). null: no
    limit."""
    silent: Seconds | None = 600.0
    """Seconds without a heartbeat from a worker. Only a library call that blocks Python stops heartbeats. null: no
    limit."""
    call: Seconds | None = None
    """Seconds for one call (a training step, the next group of samples, a start). A call may always take one minute,
    and twice the longest of its kind so far. null: no limit."""
