"""Architectures trained by roll_r3: one short file and one row each."""

from __future__ import annotations

from roll_r3.models.architectures.base import Architecture
from roll_r3.models.architectures.deepseek_v3 import DEEPSEEK_V3
from roll_r3.models.architectures.mixtral import MIXTRAL
from roll_r3.models.architectures.olmoe import OLMOE
from roll_r3.models.architectures.qwen_moe import QWEN2_MOE, QWEN3_MOE

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture for architecture in (QWEN3_MOE, QWEN2_MOE, OLMOE, MIXTRAL, DEEPSEEK_V3)
}
"""`model_type` of a config.json -> architecture."""
