"""New weights for vLLM servers: the calls of its update API.

Their transport is in `weights/channel.py`. The receiving end is `plugin/roll_r3_vllm/weights.py`, in the server's
ranks. vLLM's layers have no memory during an update, so generation is paused: requests in flight are aborted, new ones
wait. After a failure it stays paused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch

from roll_r3.weights.buckets import fill_buckets
from roll_r3.weights.channel import Meeting, ServerWeightChannel, Tensors
from roll_r3.weights.target import ServerTarget


class VllmWeightChannel(ServerWeightChannel):
    """Sending end for vLLM servers."""

    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Group weights for `send`, about `size` bytes each. vLLM writes a layer once it is whole."""
        return fill_buckets(([weight] for weight in weights), size)

    def _enter(self, target: ServerTarget, meeting: Meeting) -> None:
        joining = {
            "master_address": meeting.address,
            "master_port": meeting.port,
            "rank_offset": meeting.rank_offset,
            "world_size": meeting.world_size,
            "group_name": meeting.group_name,
            "backend": meeting.backend,
            "timeout_s": self._timeout_s,
        }
        request = {"init_info": joining}
        self._post(target, "/init_weight_transfer_engine", request, timeout_s=self._join_timeout_s)

    def _open(self, target: ServerTarget, version: str) -> None:
        self._post(target, "/pause?mode=abort", {})  # it empties the caches too
        self._post(target, "/update_weight_version", {"new_version": version})
        self._post(target, "/start_weight_update", {})

    def _take(self, target: ServerTarget, tensors: Tensors, version: str) -> None:
        self._post(target, "/update_weights", {"update_info": asdict(tensors)})

    def _close(self, target: ServerTarget, version: str) -> None:
        self._post(target, "/finish_weight_update", {"weight_version": version})
        self._post(target, "/resume", {})

    def _leave(self, target: ServerTarget) -> None:
        self._post(target, "/shutdown_weight_transfer_engine", {})
