"""What nodes take in until the engines' sender has the whole model: every strategy's export, counted.

Under Megatron (`WeightExport`) the first copy of every weight goes to the first rank of its pipeline stage: parts of
what tensor-parallel ranks share out; parts of experts to the first expert-tensor-parallel rank, then whole experts from
all expert-parallel ranks. What the first rank of a stage has put together goes to the first rank of all. Under FSDP2
each rank holds a part of every parameter, and they are gathered over all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from roll_r3.models.size import Held
from roll_r3.preflight.ranks import Grid


def gathered_into(
    grid: Grid, held: Sequence[Sequence[Held]], nodes: Sequence[int], *, element: int
) -> Mapping[int, int]:
    """Bytes that enter each node of a role.

    Args:
        held: of every stage and chunk (see `held_parameters`).
        nodes: of each rank.
        element: bytes of a parameter.
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
    """As `gathered_into`, under FSDP2.

    Args:
        parameters: of the model.
        nodes: of each rank.
        element: bytes of a parameter.
    """
    return {
        node: -(-parameters * (len(nodes) - inside) // len(nodes)) * element for node, inside in Counter(nodes).items()
    }
