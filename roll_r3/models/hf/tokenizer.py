"""Tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig


def read_tokenizer(checkpoint: Path, *, trust_remote_code: bool) -> Any:
    """Read the tokenizer, in the class named by its files.

    Args:
        trust_remote_code: run the tokenizer's own code, if there is any. The model's code is never run.

    Raises:
        Exception: any failure of its files or its code.
    """
    config = AutoConfig.from_pretrained(
        checkpoint, trust_remote_code=False
    )  # else the tokenizer would load the model's code
    return AutoTokenizer.from_pretrained(checkpoint, config=config, trust_remote_code=trust_remote_code)


def read_end_tokens(checkpoint: Path, tokenizer: Any) -> frozenset[int]:
    """Read the end token ids from config.json, generation_config.json and the tokenizer.

    Raises:
        Exception: any failure of damaged files.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    generation = (
        GenerationConfig.from_pretrained(checkpoint)
        if (checkpoint / "generation_config.json").is_file()
        else GenerationConfig.from_model_config(config)
    )
    said = (getattr(config, "eos_token_id", None), generation.eos_token_id, tokenizer.eos_token_id)
    return frozenset(i for ids in said if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
