"""Export of a checkpoint's weights for transformers.

    python -m roll_r3.export --checkpoint RUN/checkpoints/step-00000050 --output DIR

One process holds the whole model, in host memory or, with --device cuda, on a GPU. `save_hf_steps` makes a run export
the same files from its ranks. Exit status: 0 done, 1 failed, 2 the checkpoint is missing or damaged, or an option is
wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from roll_r3.config.derived import checkpoint_of, runs_megatron
from roll_r3.config.findings.report import InvalidConfigError, has_errors, render
from roll_r3.config.load import load
from roll_r3.config.model_role import model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import CheckpointError, ConfigError, RollError
from roll_r3.models.checkpoint_files import resolve_checkpoint
from roll_r3.saving.manifest import sync_directory, verify
from roll_r3.saving.state import CONFIG, TRAINER
from roll_r3.strategies.base import ProcessInfo
from roll_r3.strategies.registry import STRATEGIES
from roll_r3.trainers import world

EXIT_OK, EXIT_FAILED, EXIT_CHECKPOINT, EXIT_INTERRUPTED = 0, 1, 2, 130
_INFER = {"megatron_train": "megatron_infer", "fsdp2_train": "fsdp2_infer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m roll_r3.export", description="Export a checkpoint's weights for transformers."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step-...")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--pretrain",
        metavar="NAME",
        help="checkpoint that the run started from, for its untrained files (default: from the run's configuration)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the model (default: cpu)")
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
    """Write the weights of a checkpoint, with config and tokenizer, to `output`; it appears when complete.

    Args:
        pretrain: checkpoint that the run started from, if it has moved.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: `output` exists, the device does not, or the model cannot be built here.
        OSError: `output` cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; write cpu, or omit the option")
    if output.exists():
        raise ConfigError(f"--output {output} exists already: name a new directory")
    if output.absolute().resolve().is_relative_to(checkpoint.absolute().resolve()):
        raise ConfigError(f"--output {output} is within the checkpoint, which must not change: name another place")
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {error}") from error
    config = _on_one_rank(_config_of(checkpoint), pretrain)
    source = resolve_checkpoint(checkpoint_of(config, "actor_train"))
    store = world.host_store("127.0.0.1")
    process = ProcessInfo(master_port=store.port, device=device)
    kind = STRATEGIES[_INFER[config.actor_train.strategy_args.strategy_name]].load_model()
    strategy = kind(model_role(config, "actor_train", checkpoint=str(source)), process)
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
    """Return a configuration with the run's model on one rank, without replay."""
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
                "data_args": {"file_name": role.data_args.file_name},  # no prompt is read, no domain, no share
                "strategy_args": role.strategy_args.model_copy(update={"strategy_config": settings}),
            },
            "actor_infer": {"device_mapping": (1,)},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
