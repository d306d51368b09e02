"""Every route payload is checked on arrival: what breaks the contract never reaches a trainer.

Shape legend: L all decoder layers, M MoE layers, R rows, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.errors import RouteError


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
        num_rows: the rows that must be there: tokens of the sample less one.
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
            "were expected (rows = tokens - 1)"
        )
    ids_MRK = ids_RLK.transpose(1, 0, 2)[list(moe_layers)]
    if ids_MRK.size and (ids_MRK.min() < 0 or ids_MRK.max() >= num_experts):
        raise RouteError(
            f"routed_experts holds ids in [{ids_MRK.min()}, {ids_MRK.max()}], but the model has {num_experts} experts"
        )
    if num_rows and (empty := ~ids_MRK.any(axis=(1, 2))).any() and (top_k > 1 or num_rows > 1):
        layers = [moe_layers[i] for i in np.flatnonzero(empty).tolist()]
        raise RouteError(f"routed_experts is all zeros in MoE layers {layers}: the engine did not record them")
    compact = np.ascontiguousarray(ids_MRK.astype(route_dtype(num_experts)))
    check_distinct(compact)
    return RoutedExperts(compact)


def check_distinct(ids_MRK: npt.NDArray[np.integer]) -> None:
    """Every row names K different experts.

    Raises:
        RouteError: with the first offending (layer, row).
    """
    ordered = np.sort(ids_MRK, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if twice.any():
        layer, row = (int(i) for i in np.argwhere(twice)[0])
        raise RouteError(
            f"row {row} of MoE layer number {layer} names an expert twice: {ids_MRK[layer, row].tolist()} "
            f"({int(twice.sum())} such rows)"
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
