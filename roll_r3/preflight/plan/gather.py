"""Bytes that enter each node until the first rank has the whole model, for the export of each trainer.

Under Megatron (`WeightExport`) the first copy of every weight goes to the first rank of its pipeline stage:
tensor-parallel parts; parts of experts to the first expert-tensor-parallel rank, then whole experts from all
expert-parallel ranks. The first rank of each stage then sends its layers to rank 0. Under FSDP2 each rank holds a part
of every parameter, and all ranks are gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from roll_r3.models.size import Held
from roll_r3.preflight.plan.ranks import Grid


def gathered_into(
    grid: Grid, held: Sequence[Sequence[Held]], nodes: Sequence[int], *, element: int
) -> Mapping[int, int]:
    """Return the bytes that enter each node of a role.

    Args:
        held: parameters of every stage and chunk (see `held_parameters`).
        nodes: node of each rank.
        element: bytes per parameter.
    """
    into = Counter(dict.fromkeys(nodes, 0))

    def move(source: int, target: int, parameters: int) -> None:
        if nodes[source] != nodes[target]:
            into[nodes[target]] += parameters * element

    per_stage = len(nodes) // grid.pp
    for stage, chunks in enumerate(held):
        first = stage * per_stage
        split, experts = sum(chunk.tensor for chunk in chunks), sum(chunk.experts for chunk in chunks)
        whole = sum(chunk.dense for chunk in chunks) - split
        for rank in range(first + 1, first + grid.tp):
            move(rank, first, split)
        for holder in range(first, first + grid.etp * grid.ep, grid.etp):
            for rank in range(holder + 1, holder + grid.etp):
                move(rank, holder, experts)
            move(holder, first, experts * grid.etp)
        move(first, 0, whole + split * grid.tp + experts * grid.etp * grid.ep)
    return into


def shards_gathered_into(parameters: int, nodes: Sequence[int], *, element: int) -> Mapping[int, int]:
    """Return the bytes that enter each node under FSDP2.

    Args:
        parameters: number of parameters of the model.
        nodes: node of each rank.
        element: bytes per parameter.
    """
    return {
        node: -(-parameters * (len(nodes) - inside) // len(nodes)) * element for node, inside in Counter(nodes).items()
    }
