"""Tiny seeded checkpoints with a byte-level tokenizer: real architectures, nothing downloaded.

For tests and the quickstart. A checkpoint is an ordinary Hugging Face directory; every engine loads it as usual.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import TINY

logger = logging.getLogger(__name__)

PAD, START, END, UNUSED = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"

TINY_MODELS = {name: a.model_type for a in ARCHITECTURES.values() for name in a.tiny}
"""Name of each tiny model -> its `model_type`."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 bytes and 4 special tokens. Its chat template concatenates the messages."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for special in (PAD, START, END, UNUSED):
        vocab[special] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[START, UNUSED]
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def make_tiny_checkpoint(
    path: Path,
    name: str = "qwen3_moe",
    *,
    seed: int = 0,
    examples: Sequence[tuple[str, str]] = (),
    warm_start_steps: int = 0,
    dtype: torch.dtype = torch.float32,
    norm_noise: float = 0.02,
    **overrides: Any,
) -> Path:
    """Write a seeded checkpoint of about half a million parameters.

    Args:
        path: directory, created if missing.
        name: a key of `TINY_MODELS`.
        seed: seed of the weights and of the warm start; one machine writes the same file for a seed.
        examples: (prompt, answer) pairs of the warm start.
        warm_start_steps: supervised steps on random batches of 64 `examples` (Adam, learning rate 3e-3). After them
            some samples of a group should be right: a group with equal scores teaches nothing.
        dtype: dtype of the saved weights.
        norm_noise: standard deviation of noise added to norms and biases; they start as ones and zeros.
        overrides: changed fields of the tiny model's configuration.
    """
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    architecture = ARCHITECTURES[TINY_MODELS[name]]
    fields = {**TINY, **architecture.tiny[name], "vocab_size": len(tokenizer), **special, **overrides}
    config = AutoConfig.for_model(architecture.model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):  # zeros would leave it untested
                buffer.normal_(std=0.1)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a test would not notice exchanged or kept norms of ones and biases of zeros
                parameter.data.add_(torch.randn_like(parameter.data), alpha=norm_noise)
        if warm_start_steps:
            _warm_start(model, tokenizer, examples, warm_start_steps)
    for parameter in model.parameters():  # buffers, such as an expert bias, stay fp32 as in published checkpoints
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]], steps: int
) -> None:
    """Take a few supervised steps; the loss covers the answer and the end-of-sequence token."""
    rows, labels = [], []
    for prompt, answer in examples:
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, targets = pad(rows, True, tokenizer.pad_token_id), pad(labels, True, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        pick = torch.randint(len(ids), (64,))
        loss = model(input_ids=ids[pick], labels=targets[pick]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            logger.info("warm start: step %d of %d, loss %.3f", step + 1, steps, loss.item())
    model.eval()
