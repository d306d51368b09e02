"""New weights for SGLang servers: the calls of its update API. Their transport is in `weights/channel.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from roll_r3.engines.answers import parsed_json
from roll_r3.engines.sglang.buckets import fill_fused_buckets
from roll_r3.weights.channel import Meeting, ServerWeightChannel, Tensors
from roll_r3.weights.target import ServerTarget

_NOTHING = Tensors([], [], [])


class SglangWeightChannel(ServerWeightChannel):
    """Sending end for SGLang servers."""

    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Group weights for `send`, about `size` bytes each, and tensors fused by SGLang together."""
        return fill_fused_buckets(weights, size)

    def _enter(self, target: ServerTarget, meeting: Meeting) -> None:
        request = {
            "master_address": meeting.address,
            "master_port": meeting.port,
            "rank_offset": meeting.rank_offset,
            "world_size": meeting.world_size,
            "group_name": meeting.group_name,
            "backend": meeting.backend,
        }
        self._post(target, "/init_weights_update_group", request, timeout_s=self._join_timeout_s)

    def _succeeded(self, answer: str) -> bool:
        """Read the answer: SGLang may report a failure with status 200. /flush_cache answers in prose."""
        if not answer.lstrip().startswith(("{", "[")):
            return True
        try:
            said = parsed_json(answer)
        except ValueError:
            return False
        return not isinstance(said, dict) or said.get("success", True) is True

    def _open(self, target: ServerTarget, version: str) -> None:
        # some releases update without a session and lack the endpoint
        self._post(target, "/begin_weight_update", {}, may_be_missing=True)
        self._take(target, _NOTHING, version)

    def _take(self, target: ServerTarget, tensors: Tensors, version: str) -> None:
        """Send tensors, or none to change the version only: no other call changes it in all processes of a server."""
        request: dict[str, Any] = {**asdict(tensors), "group_name": self._group_name}
        request |= {"flush_cache": False, "weight_version": version}
        self._post(target, "/update_weights_from_distributed", request)

    def _close(self, target: ServerTarget, version: str) -> None:
        self._take(target, _NOTHING, version)
        self._post(target, "/end_weight_update", {}, may_be_missing=True)
        self._post(target, "/flush_cache", {})

    def _leave(self, target: ServerTarget) -> None:
        self._post(target, "/destroy_weights_update_group", {"group_name": self._group_name})
