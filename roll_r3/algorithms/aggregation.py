"""Aggregation of token losses: a weight per token, and one denominator for the optimizer step.

loss = sum over tokens of weight x token loss / denominator. Both follow from the masks, so the denominator is known
(and summed over data-parallel ranks) before the first micro-batch runs. The loss of given samples is independent of
their split into micro-batches and over ranks. With several optimizer steps per training step, the choice of samples for
each does depend on the ranks: a data-parallel rank draws its part from its own shard.

Shape legend: n samples, N inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from roll_r3.batch.batch import Batch
from roll_r3.config.algorithm import AlgorithmConfig


def loss_weights(batch: Batch, config: AlgorithmConfig) -> npt.NDArray[np.float32]:
    """Return the weight of each input's loss, float32 [N]; 0 for untrained inputs.

    token-mean and seq-mean-token-sum: 1. seq-mean-token-mean: 1 / trained tokens of its sample.
    seq-mean-token-sum-norm: 1 / loss_scale_factor, the same for every sample (Dr. GRPO, arXiv 2503.20783).
    """
    mask_N = batch.loss_mask_N.astype(np.float32)
    if config.loss_agg_mode == "seq-mean-token-sum-norm":
        return mask_N / np.float32(config.loss_divisor)
    if config.loss_agg_mode != "seq-mean-token-mean":
        return mask_N
    tokens_n = batch.sum_per_sample(batch.loss_mask_N)
    return mask_N * batch.per_sample((1.0 / np.maximum(tokens_n, 1)).astype(np.float32))


def loss_denominator(batch: Batch, mode: str) -> float:
    """Count this shard's trained tokens (token-mean), or its samples with trained tokens (seq-mean-*)."""
    if mode == "token-mean":
        return float(batch.loss_mask_N.sum())
    return float((batch.sum_per_sample(batch.loss_mask_N) > 0).sum())
