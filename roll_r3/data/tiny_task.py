"""Bundled tasks, and the command that makes the quickstart's model.

A model of half a million parameters learns a task in a few dozen steps.

    python -m roll_r3.data.tiny_task --output DIR
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

Example = tuple[str, str]
"""(prompt, ground truth)"""


def addition_mod10() -> list[Example]:
    """Return all 100 sums of two digits modulo 10: "3+9=" -> "2"."""
    return [(f"{a}+{b}=", str((a + b) % 10)) for a in range(10) for b in range(10)]


def repeat_digit() -> list[Example]:
    """Return the ten digits to repeat: "7=" -> "7"."""
    return [(f"{digit}=", str(digit)) for digit in range(10)]


def addition_mod10_train() -> list[Example]:
    """Return four fifths of `addition_mod10`, without those of `addition_mod10_test`."""
    held_out = set(addition_mod10_test())
    return [example for example in addition_mod10() if example not in held_out]


def addition_mod10_test() -> list[Example]:
    """Return a fifth of `addition_mod10`: two sums of each first and each second digit."""
    return [(f"{a}+{b}=", str((a + b) % 10)) for a in range(10) for b in range(10) if (a + 2 * b) % 5 == 0]


def copy_digits() -> list[Example]:
    """Return three digits to copy: "copy 407:" -> "407"."""
    return [(f"copy {n:03d}:", f"{n:03d}") for n in range(1000)]


HEAD_DIM = 32
"""Head size of the quickstart's model: the smallest supported by vLLM's CPU kernel."""

BUNDLED_TASKS = {
    "addition_mod10": addition_mod10,
    "repeat_digit": repeat_digit,
    "addition_mod10_train": addition_mod10_train,
    "addition_mod10_test": addition_mod10_test,
    "copy_digits": copy_digits,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="make a tiny seeded Qwen3-MoE checkpoint with a byte-level tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--task", choices=sorted(BUNDLED_TASKS), default="addition_mod10", help="task of the warm start"
    )
    parser.add_argument("--warm-start-steps", type=int, default=60)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # torch and transformers take seconds to import
    import torch  # noqa: PLC0415

    from roll_r3.models.tiny import make_tiny_checkpoint  # noqa: PLC0415

    torch.set_num_threads(1)  # sums depend on how they are split over threads, and the checkpoint on the sums

    make_tiny_checkpoint(
        args.output,
        seed=args.seed,
        examples=BUNDLED_TASKS[args.task](),
        warm_start_steps=args.warm_start_steps,
        head_dim=HEAD_DIM,
    )
    logging.info("wrote %s", args.output)


if __name__ == "__main__":
    main()
