"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer


def read_tokenizer(checkpoint: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer, of whatever class its files name.

    Args:
        trust_remote_code: run the tokenizer's own code, if it comes with some. The model's is not run in any case.

    Raises:
        Exception: whatever its files, and its code, lead to.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)  # else the tokenizer's class would look
    return AutoTokenizer.from_pretrained(checkpoint, config=config, trust_remote_code=trust_remote_code)
