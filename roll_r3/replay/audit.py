"""The audit: compares the experts used by every layer with the rows recorded for the same tokens.

It is independent of the routing session and shares only the reader of routes. The experts used are read from the
backend after its decision, in forward and again if backward recomputes the layer. The expected experts come from each
token's sample and position. The running micro-batch comes from the schedule and from autograd (see `Observer`).

Shape legend: t tokens seen by this rank's routers, E experts, K experts per token, L layers of a chunk, M rows of a
sample's routes on the layer axis, R rows of a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from roll_r3.batch.batch import Batch
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import Pieces, ReadRoutes, RouteRequest
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING
from roll_r3.config.workers import RouterReplayConfig
from roll_r3.errors import ReplayError
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.layer import Router
from roll_r3.replay.observer import Observer, Pass


def is_audited(replay: RouterReplayConfig, step: int) -> bool:
    """True if the configuration asks for an audit of training step `step`, counted from 1."""
    return replay.audit and replay.mode != "disable" and (step - 1) % replay.audit_every == 0


class Audit(Observer):
    """Compares the experts used in one schedule with `batch.routes` of its micro-batches. A backend adds the hooks.

    Example:
        run_schedule(model, micro_batches, objective, session, forward_only=False, observers=[audit])
        audit.verify()
    """

    def __init__(
        self,
        routers: Sequence[Sequence[Router]],
        num_micro_batches: int,
        *,
        layer_rows: Mapping[int, int],
        top_k: int,
        device: torch.device,
        read: ReadRoutes,
    ) -> None:
        """
        Args:
            routers: of each chunk.
            num_micro_batches: forwards of each chunk in the schedule.
            layer_rows: global layer -> its row on axis M of the routes.
            read: reads all rows of every sample, independent of the session's requests.
        """
        super().__init__(len(routers))
        self.audited = 0
        """Compared (token, layer) entries of this rank; a recomputation compares them again."""
        self.audit_equal = 0
        """Compared entries with exactly the recorded experts."""
        self._routers = routers
        self._num_micro_batches = num_micro_batches
        self._layer_rows = layer_rows
        self._read = read
        self._whole: dict[int, tuple[Batch, list[RoutedExperts]]] = {}
        """Chunk -> its last samples, and their routes in its layers."""
        self._top_k = top_k
        self._device = device
        self._seen: Counter[int] = Counter()
        self._faults = 0
        self._first_fault = ""

    def verify(self) -> None:
        """Check the finished schedule; collective over the world, with the same result on every rank.

        Raises:
            ReplayError: a token used other experts than its row, a slot without a row did not use k distinct experts,
                a layer ran too often or too rarely, or the backend's audit found another fault.
        """
        self._check_complete()
        counts = torch.tensor([self._faults, self.audited, self.audit_equal], device=self._device)
        dist.all_reduce(counts)
        faults, audited, equal = counts.tolist()
        if not faults:
            return
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, self._first_fault)
        raise ReplayError(
            f"the audit of the dispatch found {audited - equal} of {audited} (token, layer) entries sent to other "
            f"experts than recorded, and {faults} faults in all. The first of each rank: "
            + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
        )

    def added_to(self, counts: ReplayCounts) -> ReplayCounts:
        """Add this audit's counts to a session's."""
        return replace(counts, audited=self.audited, audit_equal=self.audit_equal)

    def fault(self, count: int, text: str) -> None:
        """Add `count` faults of one kind."""
        self._faults += count
        self._first_fault = self._first_fault or text

    def compare(self, chunk: int, layer: int, used_tE: torch.Tensor) -> torch.Tensor:
        """Compare the experts used by a layer for the current micro-batch of its chunk.

        Args:
            layer: global index.
            used_tE: bool, on the CPU.

        Returns:
            The expected experts: bool [t, E], on the CPU. For slots without a row, the experts used.
        """
        current = self.current(chunk)
        expected_tE, known_t = self._recorded(current.micro, chunk, layer, used_tE.size(-1))
        self._seen[layer] += 1
        if len(expected_tE) != len(used_tE):
            raise ReplayError(
                f"layer {layer} dispatched {len(used_tE)} tokens of a micro-batch whose map has {len(expected_tE)}"
            )
        same_t = (used_tE == expected_tE).all(-1)
        if wrong := (known_t & ~same_t).nonzero().flatten().tolist():
            self.fault(len(wrong), _mismatch(layer, current, wrong[0], used_tE, expected_tE))
        short_t = ~known_t & (used_tE.sum(-1) != self._top_k)
        if short := short_t.nonzero().flatten().tolist():
            self.fault(
                len(short),
                f"layer {layer} sent slot {short[0]}, which has no row, to {int(used_tE[short[0]].sum())} distinct "
                f"experts instead of {self._top_k}",
            )
        self.audited += int(known_t.sum())
        self.audit_equal += int((known_t & same_t).sum())
        return torch.where(known_t[:, None], expected_tE, used_tE)

    def _recorded(
        self, micro: MicroBatch, chunk: int, layer: int, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recorded experts of each slot as bool [t, E], and a mask of slots with a row [t]."""
        samples = self._samples(micro.batch, chunk)
        row = self._layer_rows[layer] - self._rows(chunk).start
        offsets, slots_t = micro.batch.offsets, micro.tokens.router_slots_t
        sample_t = np.searchsorted(offsets, slots_t, side="right") - 1
        expected_tE = np.zeros((len(slots_t), num_experts), np.bool_)
        known_t: npt.NDArray[np.bool_] = slots_t != PADDING
        for sample, routes in enumerate(samples):
            (at,) = np.nonzero((sample_t == sample) & (slots_t != PADDING))
            positions = slots_t[at] - offsets[sample]
            expected_tE[at[:, None], routes.ids_MRK[row, positions]] = True
            if routes.known_R is not None:
                known_t[at] = routes.known_R[positions]
        return torch.from_numpy(expected_tE), torch.from_numpy(known_t)

    def _samples(self, batch: Batch, chunk: int) -> list[RoutedExperts]:
        """All rows of every sample's routes, in the layers of a chunk."""
        held = self._whole.get(chunk)
        if held is None or held[0] is not batch:
            assert batch.routes is not None
            layers = self._rows(chunk)
            answers = self._read([RouteRequest(r, layers, ((0, r.num_rows),)) for r in batch.routes])
            held = self._whole[chunk] = (batch, [_joined(pieces) for pieces in answers])
        return held[1]

    def _rows(self, chunk: int) -> range:
        rows = [self._layer_rows[router.layer] for router in self._routers[chunk]]
        return range(min(rows), max(rows) + 1)

    def _check_complete(self) -> None:
        """Check that every layer ran in every forward and every recomputation."""
        for router in (router for routers in self._routers for router in routers):
            wanted = self._num_micro_batches * (2 if router.recomputed else 1)
            if self._seen[router.layer] != wanted:
                self.fault(1, f"layer {router.layer} dispatched {self._seen[router.layer]} times instead of {wanted}")


def _joined(pieces: Pieces) -> RoutedExperts:
    if len(pieces) == 1:
        return RoutedExperts(pieces[0].ids_LRK, pieces[0].known_R)
    ids_LRK = np.concatenate([piece.ids_LRK for piece in pieces], axis=1)
    return RoutedExperts(ids_LRK, np.concatenate([piece.known for piece in pieces]))


def _mismatch(layer: int, current: Pass, token: int, used_tE: torch.Tensor, expected_tE: torch.Tensor) -> str:
    batch = current.micro.batch
    slot = int(current.micro.tokens.router_slots_t[token])
    sample = int(np.searchsorted(batch.offsets, slot, side="right")) - 1
    return (
        f"layer {layer}, sample {batch.sample_ids[sample]}, position {slot - int(batch.offsets[sample])} "
        f"({'recomputed in backward' if current.backward else 'forward'}): recorded experts "
        f"{expected_tE[token].nonzero().flatten().tolist()}, used {used_tE[token].nonzero().flatten().tolist()}"
    )
