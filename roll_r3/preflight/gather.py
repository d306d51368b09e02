"""What the trainer's ranks take in when they gather the model for the engines: every strategy's export, counted.

All ranks take part for every parameter, data-parallel copies too. Under Megatron (mbridge) each pipeline group
broadcasts what a stage holds. Then experts are gathered over expert-parallel ranks and their parts over
expert-tensor-parallel ones, parts of all else over tensor-parallel ones. Under FSDP2 each rank holds a part of every
parameter, and they are gathered over all ranks.
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

    What no rank of a group has on its node enters it once for this group; a ring may bring more.

    Args:
        held: of every stage and chunk (see `held_parameters`).
        nodes: of each rank.
        element: bytes of a parameter.
    """
    into = Counter(dict.fromkeys(nodes, 0))
    stages = [sum(chunk.dense + chunk.experts for chunk in chunks) for chunks in held]
    for group in grid.groups("pp"):
        there = {nodes[rank] for rank in group}
        for source, parameters in zip(group, stages, strict=True):
            for node in there - {nodes[source]}:
                into[node] += parameters * element
    tensor = sum(chunk.tensor for chunks in held for chunk in chunks)
    experts = sum(chunk.experts for chunks in held for chunk in chunks)
    for axis, part in (("tp", tensor), ("ep", experts), ("etp", experts * grid.ep)):
        for group in grid.groups(axis):
            for node, inside in Counter(nodes[rank] for rank in group).items():
                into[node] += (len(group) - inside) * part * element
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
