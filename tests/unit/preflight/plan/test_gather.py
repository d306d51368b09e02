"""Bytes that a gather moves into each node, against a simulated exchange of single pieces."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from roll_r3.models.size import Held
from roll_r3.preflight.plan.gather import gathered_into, shards_gathered_into
from roll_r3.preflight.plan.ranks import Grid

Piece = tuple[str, int, int, int]
"""(kind, stage, two coordinates of the part)."""


@st.composite
def grids(draw) -> Grid:
    """Draw a valid layout."""
    tp, cp, dp, pp, ep, etp = (draw(st.sampled_from([1, 2, 3])) for _ in range(6))
    assume(tp * cp * dp % (ep * etp) == 0)
    return Grid(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=tp * cp * dp // (ep * etp))


def played(grid: Grid, sizes: dict[str, list[int]], nodes: list[int]) -> Counter[int]:
    """Simulate the exchange: the first rank of each group receives the missing pieces of the others."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order=order)
    expert = RankGenerator(tp=grid.etp, ep=grid.ep, dp=grid.edp, pp=grid.pp, cp=1, order=order)
    places = grid.places()
    held: list[set[Piece]] = [
        {("whole", p.pp, 0, 0), ("tensor", p.pp, p.tp, 0), ("expert", p.pp, p.ep, p.etp)} for p in places
    ]
    into: Counter[int] = Counter()

    def collect(groups: list[list[int]], *kinds: str) -> None:
        for first, *others in groups:
            for rank in others:
                for piece in held[rank] - held[first]:
                    if piece[0] in kinds:
                        held[first].add(piece)
                        into[nodes[first]] += sizes[piece[0]][piece[1]] * (nodes[rank] != nodes[first])

    stages = [group for group in dense.get_ranks("pp") if group[0] == 0]
    firsts = stages[0]
    collect([group for group in dense.get_ranks("tp") if group[0] in firsts], "tensor")
    collect([group for group in expert.get_ranks("tp") if places[group[0]].edp == 0], "expert")
    collect([group for group in expert.get_ranks("ep") if group[0] in firsts], "expert")
    collect(stages, "whole", "tensor", "expert")
    assert len(held[0]) == grid.pp * (grid.tp + grid.ep * grid.etp + 1), "the first rank has the whole model"
    return into


@settings(max_examples=200, deadline=None)
@given(grids(), st.integers(1, 9), st.data())
def test_bytes_into_each_node(grid, per_node, data):
    each = st.lists(st.integers(1, 50), min_size=grid.pp, max_size=grid.pp)
    sizes = {kind: data.draw(each) for kind in ("whole", "tensor", "expert")}
    nodes = [rank // per_node for rank in range(len(grid.places()))]
    held = [
        [Held((), whole + tensor, tensor, experts)]
        for whole, tensor, experts in zip(sizes["whole"], sizes["tensor"], sizes["expert"], strict=True)
    ]
    wanted = played(grid, sizes, nodes)
    found = gathered_into(grid, held, nodes, element=2)
    assert dict(found) == {node: 2 * wanted[node] for node in set(nodes)}


@given(data=st.data(), ranks=st.integers(1, 8), per_node=st.integers(1, 8), each=st.integers(1, 9))
def test_bytes_into_each_node_of_shards(data, ranks, per_node, each):
    order = data.draw(st.permutations(range(ranks)))
    nodes = [device // per_node for device in order]
    found = shards_gathered_into(each * ranks, nodes, element=2)
    assert dict(found) == {node: 2 * sum(each for other in nodes if other != node) for node in set(nodes)}
