"""Coordinates of every rank of a world, against megatron's own order; and refused worlds."""

from __future__ import annotations

import pytest

from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.base import ProcessInfo


def _layouts(world_size: int, **sizes):
    from roll_r3.trainers.megatron.parallel import RankLayout

    config = MegatronConfig(**sizes)
    return [RankLayout.of(config, ProcessInfo(rank=r, world_size=world_size), "here") for r in range(world_size)]


@pytest.mark.parametrize(
    ("world_size", "tp", "cp", "pp", "ep"),
    [(1, 1, 1, 1, 1), (8, 2, 1, 2, 2), (16, 2, 2, 2, 4), (24, 1, 3, 2, 4), (12, 2, 1, 3, 1)],
)
def test_ranks_are_where_megatron_puts_them(world_size: int, tp: int, cp: int, pp: int, ep: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    layouts = _layouts(
        world_size,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    dp = world_size // (tp * cp * pp)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    for axis in ("tp", "cp", "dp", "pp"):
        for group in generator.get_ranks(axis):
            assert [getattr(layouts[rank], f"{axis}_rank") for rank in group] == list(range(len(group)))
    assert all(layout.dp_size == dp and layout.etp_size == (1 if ep > 1 else tp) for layout in layouts)
    returning = [layout.dp_rank for layout in layouts if layout.returns_results]
    assert returning == list(range(dp))


def test_sequence_parallel_follows_tensor_parallel() -> None:
    (alone,) = _layouts(1)
    assert (alone.sequence_parallel, alone.sp_size, alone.token_layout(True, 1).sp_size) == (False, 1, 1)
    assert not _layouts(1, sequence_parallel=True)[0].sequence_parallel, (
        "megatron refuses it without tensor parallelism"
    )
    assert not _layouts(2, tensor_model_parallel_size=2, sequence_parallel=False)[0].sequence_parallel
    split = _layouts(2, tensor_model_parallel_size=2)[1]
    assert (split.sequence_parallel, split.sp_size, split.token_layout(True, 1).sp_rank) == (True, 2, 1)
    assert split.token_layout(True, 4).alignment == 8


@pytest.mark.parametrize(
    ("world_size", "sizes", "said"),
    [
        (3, {"tensor_model_parallel_size": 2}, "3 ranks do not divide into tensor_model_parallel_size 2"),
        (4, {"expert_model_parallel_size": 3}, "expert_model_parallel_size 3"),
        (2, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, "1 ranks of a pipeline stage"),
    ],
)
def test_a_world_that_does_not_divide_is_refused(world_size: int, sizes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _layouts(world_size, **sizes)
