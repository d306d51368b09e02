"""Delivery of routes: from the wire form of each prompt's samples to the rows of each rank; bytes and time.

    .venv/bin/python -m examples.benchmarks route_delivery

Ranks are simulated one after the other in this process: the requests of a rank follow from its place in the layout and
from the lengths of its samples alone. A rank on the engine's node reads views; other ranks receive a parcel of the
requested rows.

    handed   bytes received by the rank, over the bytes of its routers' rows in its layers
    read     seconds until the rank has its pieces, check sums included, over one copy of as many bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch

from examples.benchmarks.measuring import (
    Report,
    facts,
    in_fresh_process,
    in_turn,
    peak_bytes,
    random_group,
    ratio,
    rounded,
    timed,
)
from examples.benchmarks.route_preparation import no_live_choice, replayed
from roll_r3.batch.batch import Batch
from roll_r3.batch.grouping import assign_to_ranks, fixed_size
from roll_r3.batch.micro_batch import MicroBatch
from roll_r3.batch.route_pieces import Pieces, RouteRequest, pack, read_encoded, unpack
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.token_map import PADDING, Layout
from roll_r3.batch.wire import EncodedGroup, encode
from roll_r3.models.facts import ModelFacts
from roll_r3.trainers.cutting import cut

GROUP = 8
"""Samples per prompt; a quarter of the rows of each is the prompt's."""
MICRO_BATCH = 4
"""Samples per micro-batch."""


@dataclass(frozen=True)
class Split:
    """Sizes of a layout."""

    sp: int = 1
    cp: int = 1
    stages: int = 1
    chunks: int = 1
    """Number of chunks per stage."""
    dp: int = 1
    packed: bool = True

    @property
    def ranks(self) -> int:
        return self.sp * self.cp * self.stages * self.dp

    def layout(self, sp_rank: int, cp_rank: int) -> Layout:
        return Layout(packed=self.packed, cp_size=self.cp, cp_rank=cp_rank, sp_size=self.sp, sp_rank=sp_rank)

    def layers(self, model: ModelFacts, stage: int) -> list[range]:
        """Rows of the MoE layers of each chunk of a stage; the first stages take the remainder."""
        parts = np.array_split(np.arange(len(model.moe_layers)), self.stages * self.chunks)
        mine = parts[stage :: self.stages]
        return [range(int(part[0]), int(part[-1]) + 1) for part in mine]


class Store:
    """Wire form of every prompt's samples, as in the object stores of the engines' nodes."""

    def __init__(self, model: ModelFacts, prompts: int, tokens_per_sample: int) -> None:
        shared = tokens_per_sample // 4
        rng = np.random.default_rng(1)
        self.groups: list[EncodedGroup] = []
        self.nbytes = 0
        self.places: dict[int, tuple[int, int]] = {}
        self.samples: list[_Handle] = []
        routes = random_group(model, GROUP, shared, tokens_per_sample - shared)
        for prompt in range(prompts):  # each with lengths of its own
            lengths = rng.integers(shared + 1, tokens_per_sample + 1, GROUP)
            group = [RoutedExperts(r.ids_MRK[:, :length]) for r, length in zip(routes, lengths, strict=True)]
            encoded = encode(group, model.num_experts)
            self.groups.append(EncodedGroup(encoded))
            self.nbytes += len(encoded)
            for place, sample in enumerate(group):
                handle = _Handle(sample.num_layers, sample.num_rows, sample.top_k, sample.dtype)
                self.places[id(handle)] = (prompt, place)
                self.samples.append(handle)

    def view(self, requests: Sequence[RouteRequest]) -> list[Pieces]:
        """Return the data received by a rank on the node."""
        asked: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            asked.setdefault(self.places[id(request.routes)][0], []).append(i)
        answers: list[Pieces] = [[] for _ in requests]
        for prompt, mine in asked.items():
            places = [self.places[id(requests[i].routes)][1] for i in mine]
            found = read_encoded(self.groups[prompt], places, [requests[i] for i in mine])
            for i, pieces in zip(mine, found, strict=True):
                answers[i] = pieces
        return answers


@dataclass(frozen=True, eq=False)
class _Handle:
    """Handle of a sample's routes, like those of the object store."""

    num_layers: int
    num_rows: int
    top_k: int
    dtype: np.dtype
    nbytes: int = 0


@dataclass
class Handed:
    """Delivery to one rank, in one pass."""

    viewed: int = 0
    sent: int = 0
    needed: int = 0

    def view(self, store: Store, requests: Sequence[RouteRequest]) -> list[Pieces]:
        answers = store.view(requests)
        self.viewed += sum(piece.ids_LRK.nbytes for pieces in answers for piece in pieces)
        return answers

    def send(self, store: Store, requests: Sequence[RouteRequest]) -> list[Pieces]:
        parcel = pack(requests, store.view(requests))
        self.sent += parcel.nbytes
        return unpack(requests, parcel)


def measure(rounds: int) -> Report:
    """Measure all figures."""
    qwen, deepseek = "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3"
    layouts = {
        f"{'packed' if packed else 'padded'}, TP{sp} CP{cp} PP{stages} x{chunks} DP{dp}": Split(
            sp, cp, stages, chunks, dp, packed
        )
        for packed, sp, cp, (stages, chunks), dp in product(
            (True, False), (1, 2), (1, 2), ((1, 1), (2, 1), (2, 2)), (1, 2)
        )
    }
    return {
        "model": qwen,
        "layouts": [{"layout": name, **handed(qwen, split, 2, 1 << 10)} for name, split in layouts.items()],
        "ranks": [
            {"split": name, "ranks": split.ranks, **reading(qwen, split, rounds)}
            for name, split in {
                "one rank": Split(),
                "TP2 with SP": Split(sp=2),
                "CP2": Split(cp=2),
                "PP2": Split(stages=2),
                "TP2 CP2": Split(sp=2, cp=2),
                "TP2 CP2 PP2": Split(sp=2, cp=2, stages=2),
            }.items()
        ],
        "growth": [
            {"tokens": tokens, **reading(qwen, Split(sp=2, stages=2), rounds, tokens)}
            for tokens in (1 << 13, 1 << 15, 1 << 17)
        ],
        # 128 samples of 7,900 rows in the mean
        "large": {
            "model": deepseek,
            **large(deepseek, Split(sp=2, cp=2, stages=16, dp=16), prompts=16, tokens_per_sample=12_600),
        },
    }


def handed(model_name: str, split: Split, prompts: int, tokens_per_sample: int) -> Report:
    """Return the largest ratio over all ranks of received to needed bytes."""
    model = facts(model_name)
    store = Store(model, prompts, tokens_per_sample)
    ranks = [_handed(model, store, split, place) for place in _places(split)]
    return {
        "ranks": split.ranks,
        "viewed_over_needed": rounded(max(rank.viewed / rank.needed for rank in ranks)),
        "sent_over_needed": rounded(max(rank.sent / rank.needed for rank in ranks)),
        "rows_over_all": rounded(sum(rank.needed for rank in ranks) / sum(_ids(model, s) for s in store.samples)),
    }


def reading(model_name: str, split: Split, rounds: int, tokens: int = 1 << 16) -> Report:
    """Measure one rank's pass: views and a parcel, each over a copy of the rank's rows."""
    torch.set_num_threads(1)
    model = facts(model_name)
    store = Store(model, max(1, tokens // (GROUP * (1 << 13))), min(1 << 13, tokens // GROUP))
    place = _places(split)[-1]
    micro_batches, chunks = _shard(model, store, split, place)
    rows = np.empty(_needed(model, micro_batches, chunks), np.uint8)
    seconds = in_turn(
        {
            "copy": timed(rows.copy),
            "view": timed(lambda: replayed(model, micro_batches, chunks, partial(Handed().view, store))),
            "send": timed(lambda: replayed(model, micro_batches, chunks, partial(Handed().send, store))),
        },
        rounds,
    )
    return {
        "bytes": len(rows),
        "view_over_copy": ratio(seconds["view"], seconds["copy"]),
        "send_over_copy": ratio(seconds["send"], seconds["copy"]),
        "GB_per_s": {
            name: rounded(len(rows) / float(np.median(seconds[name])) / 1e9) for name in ("copy", "view", "send")
        },
    }


def large(model_name: str, split: Split, prompts: int, tokens_per_sample: int) -> Report:
    """Measure a step on many ranks: every rank's bytes, and the cost on up to 16 of them."""
    report: Report = in_fresh_process(_large, model_name, split, prompts, tokens_per_sample)
    return report


def _large(model_name: str, split: Split, prompts: int, tokens_per_sample: int) -> Report:
    torch.set_num_threads(1)
    model = facts(model_name)
    store = Store(model, prompts, tokens_per_sample)
    tokens = sum(sample.num_rows for sample in store.samples)
    ranks = [_handed(model, store, split, place) for place in _places(split)]
    costs = []
    for place in _places(split)[:: max(1, split.ranks // 16)]:
        micro_batches, chunks = _shard(model, store, split, place)
        run = partial(_pass, model, store, micro_batches, chunks)
        taken = timed(run)()
        costs.append((taken, peak_bytes(run), _needed(model, micro_batches, chunks)))
    whole = sum(_ids(model, sample) for sample in store.samples)
    return {
        "ranks": split.ranks,
        "layout": f"TP{split.sp} CP{split.cp} PP{split.stages} DP{split.dp}",
        "tokens": tokens,
        "stored_over_ids": rounded(store.nbytes / whole),
        "rank_bytes": {"least": min(rank.needed for rank in ranks), "most": max(rank.needed for rank in ranks)},
        "sent_over_needed": rounded(max(rank.sent / rank.needed for rank in ranks)),
        "all_routes_over_rank": rounded(whole / float(np.median([rank.needed for rank in ranks]))),
        "peak_bytes": max(peak for _, peak, _ in costs),
        "peak_over_rows": rounded(max(peak / needed for _, peak, needed in costs)),
        "pass_ms": {
            "median": rounded(1e3 * float(np.median([taken for taken, _, _ in costs]))),
            "most": rounded(1e3 * max(taken for taken, _, _ in costs)),
        },
    }


Place = tuple[int, int, int, int]
"""Data-parallel rank, stage, CP rank, SP rank."""


def _places(split: Split) -> list[Place]:
    return list(product(range(split.dp), range(split.stages), range(split.cp), range(split.sp)))


def _shard(model: ModelFacts, store: Store, split: Split, place: Place) -> tuple[list[MicroBatch], list[range]]:
    """Return a rank's micro-batches, and its chunks' layers."""
    dp_rank, stage, cp_rank, sp_rank = place
    lengths = np.array([sample.num_rows for sample in store.samples])
    mine = assign_to_ranks(lengths, split.dp)[dp_rank]
    total = int(lengths[mine].sum())
    batch = Batch(
        sample_ids=tuple(str(i) for i in mine),
        lengths_n=lengths[mine],
        input_ids_N=np.zeros(total, np.int64),
        labels_N=np.zeros(total, np.int64),
        loss_mask_N=np.ones(total, np.bool_),
        rollout_log_probs_N=np.zeros(total, np.float32),
        routes=tuple(store.samples[i] for i in mine),
    )
    groups = fixed_size(len(mine), MICRO_BATCH)
    return cut(batch, groups, split.layout(sp_rank, cp_rank)), split.layers(model, stage)


def _handed(model: ModelFacts, store: Store, split: Split, place: Place) -> Handed:
    micro_batches, chunks = _shard(model, store, split, place)
    found = Handed(needed=_needed(model, micro_batches, chunks))
    replayed(model, micro_batches, chunks, partial(found.view, store))
    replayed(model, micro_batches, chunks, partial(found.send, store))
    return found


def _needed(model: ModelFacts, micro_batches: Sequence[MicroBatch], chunks: Sequence[range]) -> int:
    """Return the bytes of the routers' rows in the present layers."""
    tokens = sum(int(np.count_nonzero(micro.tokens.router_slots_t != PADDING)) for micro in micro_batches)
    return tokens * sum(len(layers) for layers in chunks) * model.top_k * (1 if model.num_experts <= 256 else 2)


def _ids(model: ModelFacts, sample: _Handle) -> int:
    return sample.num_layers * sample.num_rows * sample.top_k * sample.dtype.itemsize


def _pass(model: ModelFacts, store: Store, micro_batches: Sequence[MicroBatch], chunks: Sequence[range]) -> None:
    """Run a pass of a rank on another node than the routes: all micro-batches forward, then all recomputed."""
    session, delivered = replayed(model, micro_batches, chunks, partial(Handed().send, store))
    with session:
        for micro in delivered:
            for chunk in range(len(chunks)):
                with session.micro_batch(chunk, micro):
                    for layer in session.layers[chunk]:
                        layer.route(len(micro.tokens.router_slots_t), model.top_k, no_live_choice)
        for micro in delivered:
            for chunk in range(len(chunks)):
                for layer in session.layers[chunk]:
                    layer.route(len(micro.tokens.router_slots_t), model.top_k, no_live_choice)
