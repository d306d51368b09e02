"""New weights for SGLang servers: the calls of its update API. How they travel is in `rollout/weights.py`.

hf_infer answers the same calls.
"""

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
    """The sending end for SGLang servers."""

    def buckets(
        self, weights: Iterable[tuple[str, torch.Tensor]], size: int
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Group weights for `send`: about `size` bytes each, and together what SGLang fuses."""
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
        """SGLang reports a failed update in its answer, whatever the status; /flush_cache answers in prose."""
        if not answer.lstrip().startswith(("{", "[")):
            return True
        try:
            said = parsed_json(answer)
        except ValueError:
            return False
        return not isinstance(said, dict) or said.get("success", True) is True

    def _open(self, target: ServerTarget, version: str) -> None:
        # releases that update without a session do not have the endpoint
        self._post(target, "/begin_weight_update", {}, may_be_missing=True)
        self._take(target, _NOTHING, version)

    def _take(self, target: ServerTarget, tensors: Tensors, version: str) -> None:
        """Without tensors: the one call that changes the version in all of a server's processes."""
        request: dict[str, Any] = {**asdict(tensors), "group_name": self._group_name}
        request |= {"flush_cache": False, "weight_version": version}
        self._post(target, "/update_weights_from_distributed", request)

    def _close(self, target: ServerTarget, version: str) -> None:
        self._take(target, _NOTHING, version)
        self._post(target, "/end_weight_update", {}, may_be_missing=True)
        self._post(target, "/flush_cache", {})

    def _leave(self, target: ServerTarget) -> None:
        self._post(target, "/destroy_weights_update_group", {"group_name": self._group_name})
