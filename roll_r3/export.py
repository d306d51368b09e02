"""Weights of a checkpoint, as transformers loads them.

    python -m roll_r3.export --checkpoint RUN/checkpoints/step-00000050 --output DIR

One process holds the whole model, in the host's memory or, with --device cuda, on a GPU. `save_hf_steps` has a run
write the same from its ranks. Exit status: 0 done, 1 it failed, 2 the checkpoint is none or is damaged, or an option
is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from roll_r3.config.derived import checkpoint_of, runs_megatron
from roll_r3.config.load import load
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.report import InvalidConfigError, has_errors, render
from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import CheckpointError, ConfigError, RollError
from roll_r3.models.checkpoint import resolve_checkpoint
from roll_r3.saving.manifest import sync_directory, verify
from roll_r3.saving.state import CONFIG, TRAINER
from roll_r3.strategies.base import ProcessInfo
from roll_r3.strategies.registry import STRATEGIES

EXIT_OK, EXIT_FAILED, EXIT_CHECKPOINT, EXIT_INTERRUPTED = 0, 1, 2, 130
_INFER = {"megatron_train": "megatron_infer", "fsdp2_train": "fsdp2_infer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m roll_r3.export", description="Write a checkpoint's weights as transformers loads them."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step-...")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory to make")
    parser.add_argument(
        "--pretrain",
        metavar="NAME",
        help="the checkpoint that the run started from, for what training leaves as it is (default: as the run says)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model is (default: cpu)")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.output, pretrain=options.pretrain, device=options.device)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT
    except (RollError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"wrote {options.output}")
    return EXIT_OK


def export(checkpoint: Path, output: Path, *, pretrain: str | None = None, device: str = "cpu") -> None:
    """Write the weights of a checkpoint, with config and tokenizer, to `output`, which appears when it is whole.

    Args:
        pretrain: what the run started from, where it is not at the place that the run says.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: there is something at `output`, there is no such device, or the model cannot be built here.
        OSError: it cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; write cpu, or leave it out")
    if output.exists():
        raise ConfigError(f"--output {output} is there already: name a directory that is not")
    if output.absolute().resolve().is_relative_to(checkpoint.absolute().resolve()):
        raise ConfigError(f"--output {output} is within the checkpoint, which must stay as it is: name one beside it")
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} is no whole checkpoint: {error}") from error
    config = _on_one_rank(_config_of(checkpoint), pretrain)
    source = resolve_checkpoint(checkpoint_of(config, "actor_train"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = ProcessInfo(master_port=port, device=device)
    kind = STRATEGIES[_INFER[config.actor_train.strategy_args.strategy_name]].load_model()
    strategy = kind(config, "actor_train", process, model_path=str(source))
    partial = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    strategy.initialize()
    try:
        strategy.load_weights(checkpoint.absolute() / TRAINER)
        strategy.save_hf(partial)
        os.rename(partial, output)
        sync_directory(output.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        strategy.close()


def _config_of(checkpoint: Path) -> RLVRConfig:
    try:
        loaded = load(checkpoint / CONFIG)
    except InvalidConfigError as error:
        raise CheckpointError(
            f"{checkpoint / CONFIG} cannot be read: {render(error.findings, error.origins)}"
        ) from error
    if has_errors(loaded.findings):
        raise CheckpointError(f"{checkpoint / CONFIG} cannot be read: {render(loaded.findings, loaded.origins)}")
    return loaded.config


def _on_one_rank(config: RLVRConfig, pretrain: str | None) -> RLVRConfig:
    """The run's model, on one rank that holds all of it and routes by itself."""
    role = config.actor_train
    settings = MegatronConfig() if runs_megatron(role) else role.strategy_args.strategy_config
    if pretrain is not None and Path(pretrain).is_dir():
        pretrain = str(Path(pretrain).absolute())
    name = pretrain or checkpoint_of(config, "actor_train")
    return RLVRConfig.model_validate(
        {
            "exp_name": config.exp_name,
            "pretrain": name,
            "actor_train": {
                "model_args": role.model_args.model_copy(update={"model_name_or_path": name}),
                "data_args": role.data_args,
                "strategy_args": role.strategy_args.model_copy(update={"strategy_config": settings}),
            },
            "actor_infer": {"device_mapping": (1,)},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
