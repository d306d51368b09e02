"""Strategies of the registry on FSDP2."""

from __future__ import annotations

from roll_r3.trainers.fsdp2.backend import Fsdp2Backend
from roll_r3.trainers.policy import InferPolicy, TrainPolicy


class Fsdp2Infer(InferPolicy):
    """One rank of a frozen model."""

    backend_class = Fsdp2Backend


class Fsdp2Train(TrainPolicy):
    """One rank of the learning policy."""

    backend_class = Fsdp2Backend
