"""The command line: load, check, then print, validate or launch.

    python -m roll_r3.run --config FILE [section.field=value ...] [--validate-only | --print-config]

Exit status: 0 done, 1 the run failed, 2 the configuration cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from roll_r3.config.load import LoadedConfig, load
from roll_r3.config.report import InvalidConfigError, render
from roll_r3.config.rules import RULES, check_rules, data_parallel_size, megatron_workers
from roll_r3.config.yaml_file import to_yaml
from roll_r3.errors import ConfigError, RollError
from roll_r3.strategies.rules import CAPABILITY_RULES

EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except RollError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    loaded = load(options.config, options.overrides)
    check(loaded)
    if options.print_config:
        print(to_yaml(loaded.config), end="")
        return EXIT_OK
    if options.validate_only:
        print(summary(loaded))
        return EXIT_OK
    from roll_r3.pipelines.launch import launch  # noqa: PLC0415  brings in torch and Ray, which checking does not need

    return launch(loaded.config)


def check(loaded: LoadedConfig) -> None:
    """Apply every rule; warnings go to stderr.

    Raises:
        InvalidConfigError: with all findings, when one of them is an error.
    """
    findings = check_rules(loaded.config, RULES + CAPABILITY_RULES)
    if any(finding.severity == "error" for finding in findings):
        raise InvalidConfigError(findings, loaded.origins)
    if findings:
        print(render(findings, loaded.origins), file=sys.stderr)


def summary(loaded: LoadedConfig) -> str:
    """A few lines that say what would run."""
    config = loaded.config
    lines = [
        f"valid: {loaded.origins.file}",
        f"  {config.exp_name}: {config.max_steps} steps of {config.rollout_batch_size} prompts x "
        f"{config.num_return_sequences_in_group} samples",
        f"  router replay: {config.actor_train.router_replay.mode}",
    ]
    for role, worker in megatron_workers(config).items():
        layout = worker.strategy_args.strategy_config
        sizes = {
            "TP": layout.tensor_model_parallel_size,
            "PP": layout.pipeline_model_parallel_size,
            "VPP": layout.virtual_pipeline_model_parallel_size,
            "EP": layout.expert_model_parallel_size,
            "CP": layout.context_parallel_size,
            "DP": data_parallel_size(worker),
        }
        shown = " ".join(f"{name} {size}" for name, size in sizes.items() if size is not None and size > 1)
        lines.append(
            f"  {role}: {worker.strategy_args.strategy_name}, devices {len(worker.device_mapping)}"
            + (f", {shown}" if shown else "")
        )
    engine = config.actor_infer
    engines = len(engine.device_mapping) // engine.strategy_args.strategy_config.tp_size
    lines.append(
        f"  actor_infer: {engine.strategy_args.strategy_name}, devices {len(engine.device_mapping)}, engines {engines}"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m roll_r3.run",
        description="Train a Mixture-of-Experts model by reinforcement learning with router replay, from a YAML file.",
        epilog="Exit status: 0 done, 1 the run failed, 2 the configuration cannot work, 130 interrupted. "
        "All fields: docs/configuration.md.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="set one field; the value is read as YAML and replaces what the file says, list items go by number",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--validate-only", action="store_true", help="check the configuration, start nothing")
    action.add_argument("--print-config", action="store_true", help="print the resolved configuration, start nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
