"""Every strategy beside its contract, for the checker of types: it compares them here, and nothing imports this module.

The registry names classes by text, since to import it must import no engine. A test compares its rows with these lines.
"""

from __future__ import annotations

from roll_r3.strategies.base import ChannelClass, InferStrategy, ModelClass, RolloutClass, TrainStrategy
from roll_r3.strategies.rollout.hf.strategy import HfRollout
from roll_r3.strategies.rollout.sglang.strategy import SglangRollout
from roll_r3.strategies.rollout.sglang.weights import SglangWeightChannel
from roll_r3.strategies.rollout.vllm.strategy import VllmRollout
from roll_r3.strategies.rollout.vllm.weights import VllmWeightChannel
from roll_r3.strategies.train.fsdp2.strategy import Fsdp2Infer, Fsdp2Train
from roll_r3.strategies.train.megatron.strategy import MegatronInfer, MegatronTrain

ROLLOUT: list[RolloutClass] = [SglangRollout, VllmRollout, HfRollout]
CHANNEL: list[ChannelClass] = [SglangWeightChannel, VllmWeightChannel]
TRAIN: list[ModelClass[TrainStrategy]] = [MegatronTrain, Fsdp2Train]
INFER: list[ModelClass[InferStrategy]] = [MegatronInfer, Fsdp2Infer]
