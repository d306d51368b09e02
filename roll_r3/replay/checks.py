"""Checks of every route payload on arrival, before it can reach a trainer.

Shape legend: L all decoder layers, M MoE layers, R rows, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.errors import RouteError

FEW_ROWS = 64
"""With top-1 routing, up to this number of tokens may all choose expert 0 in a sound router."""


def compact_routes(
    ids_RLK: npt.NDArray[np.integer],
    *,
    num_rows: int,
    num_layers: int,
    moe_layers: Sequence[int],
    num_experts: int,
    top_k: int,
) -> RoutedExperts:
    """Check an engine's payload and keep the part needed by a trainer: MoE layers, layer-major, in the smallest dtype.

    Args:
        ids_RLK: the engine's payload with all decoder layers (zeros in dense ones), [R, L, K].
        num_rows: expected rows: tokens of the sample less one, or the number of requested rows.
        num_layers: L.
        moe_layers: global indices of the MoE layers.
        num_experts: ids are in [0, num_experts).
        top_k: K.

    Raises:
        RouteError: wrong shape, an id out of range, an expert twice in one row, or an MoE layer with zeros only (the
            engine lost the layer: pipeline stages not gathered, or stale cache rows).
    """
    if ids_RLK.shape != (num_rows, num_layers, top_k):
        raise RouteError(
            f"routed_experts has shape {list(ids_RLK.shape)}, but {num_rows} rows x {num_layers} layers x top-{top_k} "
            "were expected (rows = tokens - 1, less rows not requested)"
        )
    if len(moe_layers) != num_layers:
        ids_RLK = ids_RLK[:, list(moe_layers)]  # from here on L is M
    # a payload can be many megabytes: one pass over the original, the others over a quarter of it
    if ids_RLK.size and (ids_RLK.min() < 0 or ids_RLK.max() >= num_experts):
        raise RouteError(
            f"routed_experts holds ids in [{ids_RLK.min()}, {ids_RLK.max()}], but the model has {num_experts} experts"
        )
    narrow_RMK = ids_RLK.astype(route_dtype(num_experts), copy=False)
    ids_MRK = np.array(narrow_RMK.transpose(1, 0, 2), order="C")
    # a top-1 router may send a few tokens to expert 0
    if num_rows and (empty := ~ids_MRK.any(axis=(1, 2))).any() and (top_k > 1 or num_rows > FEW_ROWS):
        layers = [moe_layers[i] for i in np.flatnonzero(empty).tolist()]
        raise RouteError(f"routed_experts is all zeros in MoE layers {layers}: {_why_empty(num_rows, top_k)}")
    check_distinct(ids_MRK)
    return RoutedExperts(ids_MRK)


def _why_empty(num_rows: int, top_k: int) -> str:
    """Explanation of a layer of zeros. With top-1 routing, a collapsed router would give the same."""
    if top_k > 1:
        return "the engine did not record them"
    return (
        f"the engine did not record them, or the router sent all {num_rows} tokens to expert 0; with one expert per "
        f"token the two look the same, and more than {FEW_ROWS} such rows are rejected"
    )


def check_distinct(ids_MRK: npt.NDArray[np.integer]) -> None:
    """Check that every row names K different experts.

    Raises:
        RouteError: names the first offending (layer, row).
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
    """Check for one finite, non-positive log-probability per sampled token.

    Raises:
        RouteError: another number of them, or another value.
    """
    if log_probs_R.shape != (num_tokens,):
        raise RouteError(f"got {len(log_probs_R)} log-probabilities for {num_tokens} sampled tokens")
    if not np.isfinite(log_probs_R).all() or (log_probs_R > 1e-4).any():
        raise RouteError(f"log-probabilities must be finite and not above 0: {log_probs_R[:8].tolist()} ...")
