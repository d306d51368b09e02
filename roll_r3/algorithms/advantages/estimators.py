"""Registry of estimators: one short module and one row each."""

from __future__ import annotations

from roll_r3.algorithms.advantages.base import Estimator
from roll_r3.algorithms.advantages.grpo import GRPO
from roll_r3.algorithms.advantages.reinforce import REINFORCE
from roll_r3.algorithms.advantages.reinforce_plus_plus_baseline import REINFORCE_PLUS_PLUS_BASELINE
from roll_r3.algorithms.advantages.rloo import RLOO

ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator for estimator in (GRPO, REINFORCE, RLOO, REINFORCE_PLUS_PLUS_BASELINE)
}
"""Value of `adv_estimator` -> estimator."""
