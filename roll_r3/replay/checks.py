"""Every route payload is checked on arrival: what breaks the contract never reaches a trainer.

Shape legend: L all decoder layers, M MoE layers, R rows, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.errors import RouteError

FEW_ROWS = 64
"""So few tokens may all go to the first expert by a sound router's choice, where each goes to one."""


def compact_routes(
    ids_RLK: npt.NDArray[np.integer],
    *,
    num_rows: int,
    num_layers: int,
    moe_layers: Sequence[int],
    num_experts: int,
    top_k: int,
) -> RoutedExperts:
    """Check an engine's payload and keep what a trainer needs: MoE layers only, layer-major, the smallest dtype.

    Args:
        ids_RLK: as engines send it, every decoder layer in it (dense ones carry zeros), [R, L, K].
        num_rows: the rows that must be there: tokens of the sample less one, or of them those that were asked for.
        num_layers: L.
        moe_layers: global indices of the layers that route.
        num_experts: ids are in [0, num_experts).
        top_k: K.

    Raises:
        RouteError: wrong shape, an id out of range, an expert twice in one row, or an MoE layer of zeros only
            (an engine that lost the layer: pipeline stages that were not gathered, or stale cache rows).
    """
    if ids_RLK.shape != (num_rows, num_layers, top_k):
        raise RouteError(
            f"routed_experts has shape {list(ids_RLK.shape)}, but {num_rows} rows x {num_layers} layers x top-{top_k} "
            "were expected (rows = tokens - 1, less those that were not asked for)"
        )
    if len(moe_layers) != num_layers:
        ids_RLK = ids_RLK[:, list(moe_layers)]  # from here on L is M
    # a payload can be many megabytes: one pass over it as it came, the others over a quarter of it
    if ids_RLK.size and (ids_RLK.min() < 0 or ids_RLK.max() >= num_experts):
        raise RouteError(
            f"routed_experts holds ids in [{ids_RLK.min()}, {ids_RLK.max()}], but the model has {num_experts} experts"
        )
    narrow_RMK = ids_RLK.astype(route_dtype(num_experts), copy=False)
    ids_MRK = np.array(narrow_RMK.transpose(1, 0, 2), order="C")
    # a router that chooses one expert may well send a few tokens to the first
    if num_rows and (empty := ~ids_MRK.any(axis=(1, 2))).any() and (top_k > 1 or num_rows > FEW_ROWS):
        layers = [moe_layers[i] for i in np.flatnonzero(empty).tolist()]
        raise RouteError(f"routed_experts is all zeros in MoE layers {layers}: {_why_empty(num_rows, top_k)}")
    check_distinct(ids_MRK)
    return RoutedExperts(ids_MRK)


def _why_empty(num_rows: int, top_k: int) -> str:
    """Meaning of zeros alone. With one expert a token they are also what a collapsed router would give."""
    if top_k > 1:
        return "the engine did not record them"
    return (
        f"the engine did not record them, or the router sent all {num_rows} tokens to expert 0; with one expert a "
        f"token these cannot be told apart, and more than {FEW_ROWS} such rows are rejected"
    )


def check_distinct(ids_MRK: npt.NDArray[np.integer]) -> None:
    """Every row names K different experts.

    Raises:
        RouteError: with the first offending (layer, row).
    """
    # each pair of choices compared over all rows: a tenth of the time that sorting the rows takes
    choices_KMR = np.ascontiguousarray(ids_MRK.transpose(2, 0, 1))
    twice_MR = np.zeros(ids_MRK.shape[:2], np.bool_)
    for later in range(1, len(choices_KMR)):
        for earlier in range(later):
            twice_MR |= choices_KMR[later] == choices_KMR[earlier]
    if twice_MR.any():
        layer, row = (int(i) for i in np.argwhere(twice_MR)[0])
        raise RouteError(
            f"row {row} of MoE layer number {layer} names an expert twice: {ids_MRK[layer, row].tolist()} "
            f"({int(twice_MR.sum())} such rows)"
        )


def check_log_probs(log_probs_R: npt.NDArray[np.floating], num_tokens: int) -> None:
    """One finite, non-positive log-probability per sampled token.

    Raises:
        RouteError: otherwise.
    """
    if log_probs_R.shape != (num_tokens,):
        raise RouteError(f"{len(log_probs_R)} log-probabilities came with {num_tokens} sampled tokens")
    if not np.isfinite(log_probs_R).all() or (log_probs_R > 1e-4).any():
        raise RouteError(f"log-probabilities must be finite and not above 0: {log_probs_R[:8].tolist()} ...")
