"""Numbers of a translated file, against ROLL's formulas on padded tensors.

The reference reads ROLL's own keys, with ROLL's defaults, so it tests the translation too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roll_r3.algorithms.advantages import token_advantages
from roll_r3.algorithms.aggregation import loss_denominator, loss_weights
from roll_r3.algorithms.corrections import corrected
from roll_r3.algorithms.losses.base import TokenInputs
from roll_r3.algorithms.losses.policy_loss import policy_loss
from roll_r3.algorithms.losses.sample_sums import SampleSums
from roll_r3.algorithms.sample_masks import mask_samples
from roll_r3.algorithms.stats import TokenStats
from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.token_map import Layout, build_token_map
from roll_r3.config.derived import algorithm_of
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules import check_rules
from roll_r3.from_roll.formulas import FORMULAS
from tests.unit.from_roll.cases import MATH, of_roll, run
from tests.unit.from_roll.rolls_reference import DOMAINS, GROUP, LONGEST, Samples, rolls_loss, samples

REDUCED = {"adv_estimator": "reinforce", "reward_clip": 10, "advantage_clip": 2.0}
PG = {"actor_train__worker_cls": "roll.pipeline.rlvr.actor_pg_worker.ActorPGWorker"}
KL = {"add_token_level_kl": True, "init_kl_coef": 0.3, "reference": {}}
RECIPE = {
    **REDUCED,
    "whiten_advantages": True,
    "max_len_mask": True,
    "difficulty_mask": True,
    "difficulty_low_threshold": 0.1,
    "difficulty_high_threshold": 0.95,
    "dual_clip_loss": True,
}
"""Settings copied through most of ROLL's example files."""


def weighted(level: str, bound: float | None = 1.2) -> dict[str, Any]:
    return {"train_infer_correction": {"is_weight": {"enabled": True, "weight_type": level, "upper_bound": bound}}}


def filtered(*items: dict[str, Any]) -> dict[str, Any]:
    return {"train_infer_correction": {"filters": [{"enabled": True, **item} for item in items]}}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("norms", RECIPE),
    *(
        ("norms", {"adv_estimator": "reinforce", "norm_mean_type": mean, "norm_std_type": std})
        for mean, std in ((None, "batch"), ("batch", None), ("batch", "batch"), ("group", None), ("group", "group"))
    ),
    ("norms", {**REDUCED, "norm_mean_type": "group", "norm_std_type": "batch"}),
    ("grpo", {"adv_estimator": "grpo", "norm_mean_type": "batch"}),
    ("reward-clip", {"adv_estimator": "grpo", "reward_clip": 0.7}),
    ("reward-clip", {"adv_estimator": "grpo", "reward_clip": 0.4, **KL}),
    *(("kl-in-reward", {"adv_estimator": "grpo", "kl_penalty": name, **KL}) for name in ("kl", "abs", "mse")),
    ("whitening", {"adv_estimator": "reinforce", "whiten_advantages": True}),
    ("whitening", {**RECIPE, **KL}),
    ("length-mask", {"adv_estimator": "grpo", "max_len_mask": True}),
    ("difficulty-mask", {"adv_estimator": "grpo", "difficulty_mask": True, "difficulty_low_threshold": 0.3}),
    ("advantage-clip", {"adv_estimator": "grpo", "advantage_clip": 0.8}),
    ("ppo", {"adv_estimator": "grpo", "pg_clip": 0.3, "pg_clip_low": 0.9}),
    ("ppo", {"adv_estimator": "grpo", "use_pg_clip_range": True, "pg_clip_high": 0.28, "pg_clip_low": 0.1}),
    ("ppo", {"adv_estimator": "grpo", **PG, "actor_train__pg_variant": "ppo"}),
    ("dual-clip", {"adv_estimator": "grpo", "dual_clip_loss": True, "pg_clip": 0.1}),
    ("sample-ratio", {"adv_estimator": "grpo", "importance_sampling": "seq", "pg_clip": 0.01}),
    ("vanilla", {**REDUCED, **PG, "actor_train__pg_variant": "vanilla", "pg_clip": 0.1, "dual_clip_loss": True}),
    ("tis", {**REDUCED, **PG, "actor_train__pg_variant": "tis"}),
    ("topr", {**REDUCED, **PG, "actor_train__pg_variant": "topr", "norm_mean_type": "batch"}),
    (
        "topr",
        {
            "adv_estimator": "grpo",
            **PG,
            "actor_train__pg_variant": "topr",
            "actor_train__topr_positive_weight": 2.0,
            "actor_train__topr_negative_weight": 0.5,
        },
    ),
    ("cispo", {"adv_estimator": "grpo", **PG, "actor_train__pg_variant": "cispo", "use_pg_clip_range": True}),
    ("kimi15", {"adv_estimator": "grpo", **PG, "actor_train__pg_variant": "kimi15"}),
    *(("is-weight", {**RECIPE, **weighted(level)}) for level in ("token", "geometric", "sequence", "segment")),
    ("is-weight", {"adv_estimator": "grpo", **weighted("token", None)}),
    ("is-weight", {"adv_estimator": "grpo", "use_rollout_importance_sampling_ratio": True}),
    ("filters", {"adv_estimator": "grpo", **filtered({})}),
    ("filters", {"adv_estimator": "grpo", "loss_agg_mode": "token-mean", **filtered({"ratio_high": 2.0})}),
    *(
        (
            "filters",
            {**RECIPE, **filtered({"agg_type": level, "ratio_low": 0.3, "ratio_high": 3.0, "diff_enabled": True})},
        )
        for level in ("token", "geometric", "sequence", "segment")
    ),
    ("filters", {"adv_estimator": "grpo", "train_infer_diff_mask": True, "train_infer_ratio_seq_mask": True}),
    *(
        ("aggregation", {**RECIPE, "loss_agg_mode": mode})
        for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
    ),
    ("kl-loss", {"adv_estimator": "grpo", "use_kl_loss": True, "kl_loss_coef": 0.4, "reference": {}}),
    ("kl-loss", {**RECIPE, "use_kl_loss": True, "kl_loss_coef": 0.4, "reference": {}, "loss_agg_mode": "token-mean"}),
]
"""(formula, changes to a small file of ROLL)."""


def batch_of(s: Samples) -> Batch:
    """Return the responses in training form; the prompt is one token, so inputs are those of the response."""

    def flat(values: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        return values[s.mask].numpy().astype(np.float32)

    n = int(s.mask.sum())
    zeros = np.zeros(n, np.int64)
    return Batch(
        sample_ids=tuple(map(str, range(len(s.scores)))),
        lengths_n=s.lengths.numpy(),
        input_ids_N=zeros,
        labels_N=zeros,
        loss_mask_N=np.ones(n, bool),
        rollout_log_probs_N=flat(s.rollout),
        old_log_probs_N=flat(s.old),
        ref_log_probs_N=flat(s.ref),
        scores_n=s.scores.numpy().astype(np.float32),
    )


def our_loss(config: RLVRConfig, s: Samples, live_N: Tensor) -> tuple[Tensor, Batch]:
    """Return (loss of the optimizer step, the batch with its advantages), from the functions of a run."""
    algorithm = algorithm_of(config)
    scores, groups = s.scores.numpy(), [f"g{i // GROUP}" for i in range(len(s.scores))]
    truncated = (s.lengths == LONGEST).tolist()
    batch, _ = mask_samples(batch_of(s), scores, groups, truncated, algorithm)
    batch = replace(batch, advantages_N=token_advantages(batch, scores, groups, s.domains, algorithm).advantages_N)
    batch = corrected(batch, algorithm.rollout_correction).batch
    tokens = build_token_map(batch.lengths_n, Layout(packed=True))
    micro = MicroBatch(batch, np.arange(batch.num_samples), tokens)

    def row(values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values)).double()[None]

    assert batch.scores_n is not None
    inputs = TokenInputs(
        mask=torch.from_numpy(batch.loss_mask_N)[None],
        advantages=row(batch.advantages_N),
        old_log_probs=row(batch.old_log_probs_N),
        ref_log_probs=row(batch.ref_log_probs_N),
        weights=row(loss_weights(batch, algorithm)) / loss_denominator(batch, algorithm.loss_agg_mode),
        pg_weights=None if batch.pg_weights_N is None else row(batch.pg_weights_N),
        scores=row(batch.per_sample(batch.scores_n)),
        sums=SampleSums(micro, torch.device("cpu"), lambda values: None),
    )
    losses = policy_loss(live_N[None], None, inputs, algorithm, TokenStats())
    return (losses * inputs.weights).sum(), batch


@pytest.mark.parametrize(("formula", "changes"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_a_translated_file_computes_what_rolls_computes(formula, changes):
    other = {"worker_cls": MATH, "tag_included": ["b"]}
    roll = of_two_domains(of_roll(**{"rewards__other": other, "device_type": "cpu", **changes}))
    translated, named = run(roll)
    assert "roll-unsupported" not in named
    config = RLVRConfig.model_validate(translated)
    assert not [f for f in check_rules(config) if f.severity == "error"]
    worst = 0.0
    for seed in range(5):
        s = samples(seed)
        live = s.live.clone().requires_grad_()
        wanted, advantages = rolls_loss(roll, s, live)
        (gradient,) = torch.autograd.grad(wanted, live)
        live_N = s.live[s.mask].clone().requires_grad_()
        got, batch = our_loss(config, s, live_N)
        (our_gradient,) = torch.autograd.grad(got, live_N)
        assert batch.advantages_N is not None
        pairs = (
            (torch.from_numpy(batch.advantages_N).double(), advantages[s.mask]),
            (got.detach(), wanted.detach()),
            (our_gradient, gradient[s.mask]),
        )
        for ours, rolls in pairs:
            assert rolls.abs().max() > 0, "the case has something to compare"
            scale = max(float(rolls.abs().max()), 0.1 if rolls.dim() == 0 else 0.0)  # terms of the loss cancel
            worst = max(worst, float((ours - rolls).abs().max()) / scale)
    print(f"{formula}: worst error {worst:.1e}")
    assert worst < 2e-6


def of_two_domains(roll: dict[str, Any]) -> dict[str, Any]:
    """Return a file with two domains of equal share."""
    shares = {"domain_interleave_probs": dict.fromkeys(DOMAINS, 0.5)}
    train = roll["actor_train"]
    return {**roll, "actor_train": {**train, "data_args": {**train["data_args"], **shares}}}


def test_every_formula_of_the_page_has_a_case_and_the_reverse():
    assert set(Counter(name for name, _ in CASES)) == {formula.name for formula in FORMULAS}
