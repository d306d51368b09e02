"""Names of strategies, their abilities, and the places of their code. Importing this module imports no engine.

To add a strategy: a typed config in `roll_r3.config.strategies`, a package in engines/ or a backend in trainers/, a row
here, and a line in `tests/types/contracts.py`, where mypy compares the class with its contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from roll_r3.config.base import Config
from roll_r3.config.strategies import Fsdp2Config, HfInferConfig, MegatronConfig, SglangConfig, VllmConfig
from roll_r3.models.architectures.hf_fields import Builder
from roll_r3.strategies.base import (
    Capabilities,
    ChannelClass,
    InferStrategy,
    ModelClass,
    RolloutClass,
    TrainStrategy,
)


@dataclass(frozen=True)
class StrategyEntry:
    """One row of the registry."""

    kind: Literal["rollout", "train", "infer"]
    config: type[Config]
    capabilities: Capabilities
    builder: Builder
    """The library used to build the model from the checkpoint's config.json."""
    factory: str
    """`module:attribute` of the strategy class, imported when it is first needed."""
    weight_channel: str | None = None
    """Rollout only: `module:attribute` of the class that sends weights to a list of its `WeightTarget`s."""

    def load_rollout(self) -> RolloutClass:
        """The class of a rollout strategy."""
        assert self.kind == "rollout", f"{self.factory} samples nothing"
        made: RolloutClass = load_attribute(self.factory)
        return made

    def load_channel(self) -> ChannelClass:
        """Load the class of the weight channel to a rollout strategy's engines."""
        assert self.weight_channel is not None, f"{self.factory} takes no weights"
        made: ChannelClass = load_attribute(self.weight_channel)
        return made

    def load_model(self) -> ModelClass[InferStrategy]:
        """Load the class of a strategy for log-probabilities, trained or not."""
        assert self.kind in ("train", "infer"), f"{self.factory} is not a rank of a model"
        made: ModelClass[InferStrategy] = load_attribute(self.factory)
        return made

    def load_trainer(self) -> ModelClass[TrainStrategy]:
        """Load the class of a trained strategy."""
        assert self.kind == "train", f"{self.factory} learns nothing"
        made: ModelClass[TrainStrategy] = load_attribute(self.factory)
        return made


def load_attribute(path: str) -> Any:
    """Import `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


_REPLAYS = frozenset({"R2", "R3"})
_MEGATRON = "roll_r3.trainers.megatron.strategy"
_FSDP2 = "roll_r3.trainers.fsdp2.strategy"

STRATEGIES: dict[str, StrategyEntry] = {
    "sglang": StrategyEntry(
        kind="rollout",
        config=SglangConfig,
        capabilities=Capabilities(records_routes=True),
        builder=Builder.SGLANG,
        factory="roll_r3.engines.sglang.strategy:SglangRollout",
        weight_channel="roll_r3.engines.sglang.weights:SglangWeightChannel",
    ),
    "vllm": StrategyEntry(
        kind="rollout",
        config=VllmConfig,
        capabilities=Capabilities(records_routes=True),
        builder=Builder.VLLM,
        factory="roll_r3.engines.vllm.strategy:VllmRollout",
        weight_channel="roll_r3.engines.vllm.weights:VllmWeightChannel",
    ),
    "hf_infer": StrategyEntry(
        kind="rollout",
        config=HfInferConfig,
        capabilities=Capabilities(records_routes=True),
        builder=Builder.TRANSFORMERS,
        factory="roll_r3.engines.hf.strategy:HfRollout",
        weight_channel="roll_r3.engines.hf.weights:HfWeightChannel",
    ),
    "megatron_train": StrategyEntry(
        kind="train",
        config=MegatronConfig,
        capabilities=Capabilities(replays=_REPLAYS, packs=True),
        builder=Builder.MEGATRON,
        factory=f"{_MEGATRON}:MegatronTrain",
    ),
    "megatron_infer": StrategyEntry(
        kind="infer",
        config=MegatronConfig,
        capabilities=Capabilities(packs=True),
        builder=Builder.MEGATRON,
        factory=f"{_MEGATRON}:MegatronInfer",
    ),
    "fsdp2_train": StrategyEntry(
        kind="train",
        config=Fsdp2Config,
        capabilities=Capabilities(replays=_REPLAYS, packs=True),
        builder=Builder.TRANSFORMERS,
        factory=f"{_FSDP2}:Fsdp2Train",
    ),
    "fsdp2_infer": StrategyEntry(
        kind="infer",
        config=Fsdp2Config,
        capabilities=Capabilities(packs=True),
        builder=Builder.TRANSFORMERS,
        factory=f"{_FSDP2}:Fsdp2Infer",
    ),
}
