"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig


def read_tokenizer(checkpoint: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer, of whatever class its files name.

    Args:
        trust_remote_code: run the tokenizer's own code, if it comes with some. The model's is not run in any case.

    Raises:
        Exception: whatever its files, and its code, lead to.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)  # else the tokenizer's class would look
    return AutoTokenizer.from_pretrained(checkpoint, config=config, trust_remote_code=trust_remote_code)


def read_end_tokens(checkpoint: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a response: those of config.json, of generation_config.json and of the checkpoint's tokenizer.

    Raises:
        Exception: anything that damaged files lead to.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    generation = (
        GenerationConfig.from_pretrained(checkpoint)
        if (checkpoint / "generation_config.json").is_file()
        else GenerationConfig.from_model_config(config)
    )
    said = (getattr(config, "eos_token_id", None), generation.eos_token_id, tokenizer.eos_token_id)
    return frozenset(i for ids in said if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
