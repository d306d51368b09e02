"""Strategies of the registry on megatron-core."""

from __future__ import annotations

from roll_r3.trainers.megatron.backend import MegatronBackend
from roll_r3.trainers.policy import InferPolicy, TrainPolicy


class MegatronInfer(InferPolicy):
    """One rank of a frozen model."""

    backend_class = MegatronBackend


class MegatronTrain(TrainPolicy):
    """One rank of the learning policy."""

    backend_class = MegatronBackend
