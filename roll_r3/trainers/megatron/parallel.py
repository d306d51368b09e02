"""A rank's parallel coordinates, and megatron's process groups.

Order of ranks: megatron's default "tp-cp-ep-dp-pp", tensor-parallel ranks innermost, stages outermost.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from roll_r3.batch.token_map import Layout
from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.base import ProcessInfo
from roll_r3.trainers import world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankLayout:
    """Parallel sizes, and this rank's place in each; computed before any process group exists."""

    tp_size: int
    pp_size: int
    vpp_size: int | None
    cp_size: int
    ep_size: int
    etp_size: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    sequence_parallel: bool

    @classmethod
    def of(cls, config: MegatronConfig, process: ProcessInfo, fields: str) -> RankLayout:
        """Place `process` in the layout.

        Args:
            fields: dotted path of the `strategy_config`, for messages.

        Raises:
            ConfigError: the number of ranks is not divisible by the model-parallel sizes.
        """
        tp, pp, cp = (
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.context_parallel_size,
        )
        ep = config.expert_model_parallel_size
        etp = config.expert_tensor_parallel_size or (1 if ep > 1 else tp)
        if process.world_size % (tp * cp * pp):
            raise ConfigError(
                f"{fields}: {process.world_size} ranks do not divide into tensor_model_parallel_size {tp} x "
                f"context_parallel_size {cp} x pipeline_model_parallel_size {pp}; change a size or device_mapping"
            )
        if (process.world_size // pp) % (ep * etp):
            raise ConfigError(
                f"{fields}: the {process.world_size // pp} ranks of a pipeline stage do not divide into "
                f"expert_model_parallel_size {ep} x expert_tensor_parallel_size {etp}; change a size or device_mapping"
            )
        dp = process.world_size // (tp * cp * pp)
        return cls(
            tp_size=tp,
            pp_size=pp,
            vpp_size=config.chunks_per_stage,
            cp_size=cp,
            ep_size=ep,
            etp_size=etp,
            dp_size=dp,
            tp_rank=process.rank % tp,
            cp_rank=process.rank // tp % cp,
            dp_rank=process.rank // (tp * cp) % dp,
            pp_rank=process.rank // (tp * cp * dp),
            sequence_parallel=tp > 1 and config.sequence_parallel is not False,
        )

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def returns_results(self) -> bool:
        """True on exactly one rank of each data-parallel shard, in the last stage (it has the logits)."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def sp_size(self) -> int:
        return self.tp_size if self.sequence_parallel else 1

    def token_layout(self, packed: bool, multiple: int) -> Layout:
        """Layout of a micro-batch on this rank (see `Layout` for the arguments)."""
        return Layout(
            packed=packed,
            cp_size=self.cp_size,
            cp_rank=self.cp_rank,
            sp_size=self.sp_size,
            sp_rank=self.tp_rank if self.sequence_parallel else 0,
            multiple=multiple,
        )


_members = 0
"""Number of strategies of this process using megatron's groups; megatron has one set of groups per process."""


def join(process: ProcessInfo, layout: RankLayout, seed: int) -> torch.device:
    """Join the world and make megatron's groups; a second strategy of the same layout shares them.

    Returns:
        Device of this process's models.

    Raises:
        ConfigError: another strategy of this process uses another layout.
    """
    global _members
    device = world.join(process)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tp_size,
            layout.pp_size,
            layout.vpp_size,
            context_parallel_size=layout.cp_size,
            expert_model_parallel_size=layout.ep_size,
            expert_tensor_parallel_size=layout.etp_size,
            distributed_timeout_minutes=int(world.COLLECTIVE_TIMEOUT.total_seconds() // 60),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        _check_groups(layout)
    except ConfigError:
        world.leave()
        raise
    _members += 1
    return device


def leave() -> None:
    """Undo one `join`; the last call destroys the groups."""
    global _members
    _members -= 1
    if _members == 0:
        parallel_state.destroy_model_parallel()
        # megatron does not release these: each would keep a group of this world, and its threads, forever
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = None
        for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
            embedding.forward.cache_clear()  # cached by the embedding, which holds its context-parallel group
    world.leave()


def _check_groups(layout: RankLayout) -> None:
    """Check the existing groups against `layout`."""
    made = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    wanted = (
        layout.tp_size,
        layout.tp_rank,
        layout.pp_size,
        layout.pp_rank,
        layout.vpp_size,
        layout.cp_size,
        layout.cp_rank,
        layout.ep_size,
        layout.etp_size,
        layout.dp_size,
        layout.dp_rank,
    )
    if made != wanted:
        raise ConfigError(
            f"this process already runs megatron with the layout {made} (tp, pp, vpp, cp, ep, etp, dp and ranks), but "
            f"another role asks for {wanted}: give both roles the same parallel sizes, or separate processes"
        )
