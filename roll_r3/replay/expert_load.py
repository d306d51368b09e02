"""Load of the experts: the number of times each was chosen, by the rollout and by the live router.

A router that collapses sends every token to the same few experts. Shape legend: M MoE layers of the model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SIDES = ("rollout", "live")
"""Origin of the choices: the replayed routes, and the router's own choice at the same tokens."""


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Counts of a pass, summed over all ranks of the world.

    Ranks that see the same tokens count them several times, all layers and experts alike: shares do not change.
    """

    layers: tuple[int, ...]
    """Global indices of the MoE layers."""
    counts_2ME: npt.NDArray[np.int64]
    """The first axis as `SIDES`; all 0 for a side without choices, as of the rollout under R2."""


def load_metrics(load: ExpertLoad) -> dict[str, float]:
    """Return shares and entropies of each side with choices, over layers and per layer, by metric name."""
    metrics: dict[str, float] = {}
    for side, counts_ME in zip(SIDES, load.counts_2ME, strict=True):
        totals_M = counts_ME.sum(1)
        if not totals_M.any():
            continue
        shares_ME = counts_ME / np.maximum(totals_M, 1)[:, None]
        logs_ME = np.log(shares_ME, out=np.zeros(shares_ME.shape), where=shares_ME > 0)
        entropy_M = -(shares_ME * logs_ME).sum(1) / np.log(max(counts_ME.shape[1], 2))
        highest_M, lowest_M = shares_ME.max(1), shares_ME.min(1)
        figures = {
            "max_share": highest_M.mean(),
            "max_share_worst": highest_M.max(),
            "min_share": lowest_M.mean(),
            "min_share_worst": lowest_M.min(),
            "entropy": entropy_M.mean(),
            "entropy_worst": entropy_M.min(),
            "worst_layer": load.layers[int(entropy_M.argmin())],
            **{f"layer_{layer}": entropy for layer, entropy in zip(load.layers, entropy_M, strict=True)},
        }
        metrics |= {f"expert_load/{side}/{name}": float(figure) for name, figure in figures.items()}
    return metrics
