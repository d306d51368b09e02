"""Every strategy and tracker beside its contract: mypy compares them here. Nothing imports this module.

The registry names classes by text, because importing the registry must import no engine. A unit test compares its rows
with these lines.
"""

from __future__ import annotations

from roll_r3.engines.hf.strategy import HfRollout
from roll_r3.engines.hf.weights import HfWeightChannel
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.engines.sglang.weights import SglangWeightChannel
from roll_r3.engines.vllm.strategy import VllmRollout
from roll_r3.engines.vllm.weights import VllmWeightChannel
from roll_r3.strategies.base import ChannelClass, InferStrategy, ModelClass, RolloutClass, TrainStrategy
from roll_r3.tracking.trackers.base import Start
from roll_r3.tracking.trackers.mlflow import MlflowTracker
from roll_r3.tracking.trackers.swanlab import SwanlabTracker
from roll_r3.tracking.trackers.tensorboard import TensorboardTracker
from roll_r3.tracking.trackers.trackio import TrackioTracker
from roll_r3.tracking.trackers.wandb import WandbTracker
from roll_r3.trainers.fsdp2.strategy import Fsdp2Infer, Fsdp2Train
from roll_r3.trainers.megatron.strategy import MegatronInfer, MegatronTrain

ROLLOUT: list[RolloutClass] = [SglangRollout, VllmRollout, HfRollout]
CHANNEL: list[ChannelClass] = [SglangWeightChannel, VllmWeightChannel, HfWeightChannel]
TRAIN: list[ModelClass[TrainStrategy]] = [MegatronTrain, Fsdp2Train]
TRACKER: list[Start] = [TensorboardTracker, WandbTracker, MlflowTracker, SwanlabTracker, TrackioTracker]
INFER: list[ModelClass[InferStrategy]] = [MegatronInfer, Fsdp2Infer]
