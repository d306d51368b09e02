"""The command line: load, check, then print, plan or launch.

    python -m roll_r3.run --config FILE [section.field=value ...] [--validate-only | --print-config | --plan]
    python -m roll_r3.run --config FILE [section.field=value ...] --eval-only
    python -m roll_r3.run --explain RULE

Exit status: 0 done, 1 the run failed, 2 the configuration cannot work, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from roll_r3.config.derived import checkpoint_of, devices_per_node, model_workers
from roll_r3.config.findings.report import Finding, InvalidConfigError, Origins, as_json, has_errors, render
from roll_r3.config.findings.write_errors import explain
from roll_r3.config.load import LoadedConfig, load
from roll_r3.config.reading.yaml_file import to_yaml
from roll_r3.config.rules.variables import possible
from roll_r3.errors import ConfigError, RollError
from roll_r3.from_roll.roll_dialect import ROLL
from roll_r3.preflight.check import check
from roll_r3.preflight.plan.make import make_plan
from roll_r3.preflight.plan.plan import Plan
from roll_r3.preflight.plan.text import plan_json, render_plan
from roll_r3.preflight.rule_pages import explain_rule, rule_ids, similar_rules
from roll_r3.preflight.summary import summary
from roll_r3.preflight.surroundings import Surroundings, elsewhere, read_surroundings
from roll_r3.processes import variables_set

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    _reject_misplaced(parser, options)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters of a configuration
            stream.reconfigure(errors="backslashreplace")
    try:
        with ExitStack() as stack:
            status = _explain(options.explain) if options.explain is not None else _run(options, stack)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
        return status
    except InvalidConfigError as error:
        _report(options, error.findings, error.origins)
        return EXIT_CONFIG
    except ConfigError as error:
        _report(options, [Finding("configuration", "error", (), str(error))], Origins(str(options.config)))
        return EXIT_CONFIG
    except RollError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if not _starts_run(options):
            if not isinstance(error, BrokenPipeError):
                raise
            _discard_output()
            return EXIT_OK
        if logging.getLogger().handlers:  # without a log it would go to the terminal
            logger.exception("the run stopped")
        print(f"error: {explain(error)}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _reject_misplaced(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message about an option without effect."""
    if options.config is None and options.explain is None:
        parser.error("--config FILE is required")
    if options.explain is not None and (options.config or options.overrides or options.elsewhere):
        parser.error("--explain takes the name of a rule and nothing else")
    if _starts_run(options) and options.format != "text":
        parser.error("--format needs --validate-only or --plan")
    if options.print_config and options.format != "text":
        parser.error("--print-config prints YAML: leave --format out")
    if options.show_dropped and (options.format != "text" or options.explain is not None):
        parser.error("--show-dropped needs findings as text: JSON has every key")


def _discard_output() -> None:
    """Discard the rest of the output: the reader closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _starts_run(options: argparse.Namespace) -> bool:
    """Return true if the command is to train or evaluate, not to check or print the configuration."""
    return not (options.validate_only or options.print_config or options.plan or options.explain is not None)


def _run(options: argparse.Namespace, stack: ExitStack) -> int:
    """Do what the options ask, with the file's environment variables set until `stack` closes."""
    loaded = load(options.config, options.overrides, ROLL)
    stack.enter_context(variables_set(possible(loaded.config.system_envs)))  # they may name the hub's cache
    surroundings = (elsewhere if options.elsewhere else read_surroundings)(loaded.config)
    findings = check(loaded, surroundings)
    if has_errors(findings):
        raise InvalidConfigError(findings, loaded.origins)
    if options.validate_only:
        _report(options, findings, loaded.origins)
        if options.format == "text":
            print(summary(loaded.config, loaded.origins, surroundings))
        return EXIT_OK
    if options.plan and options.format == "json":
        plan = plan_json(_plan(loaded, surroundings))
        found = {"dialect": _dialect(loaded.origins), "findings": as_json(findings, loaded.origins)}
        print(json.dumps(plan | found, indent=2))
        return EXIT_OK
    if findings:
        print(render(findings, loaded.origins, show_dropped=options.show_dropped), file=sys.stderr)
    if options.print_config:
        print(to_yaml(loaded.config), end="")
        return EXIT_OK
    if options.plan:
        print(render_plan(_plan(loaded, surroundings)))
        return EXIT_OK
    if options.eval_only and loaded.config.validation is None:
        raise ConfigError("--eval-only needs prompts to evaluate: add the section `validation` to the configuration")
    if options.eval_only:
        from roll_r3.pipelines.lifecycle.launch import evaluate  # noqa: PLC0415  as below

        return evaluate(loaded.config, loaded.origins)
    from roll_r3.pipelines.lifecycle.launch import launch  # noqa: PLC0415  imports torch and Ray, not needed for checks

    return launch(loaded.config, loaded.origins)


def _plan(loaded: LoadedConfig, surroundings: Surroundings) -> Plan:
    models = {}
    for role in model_workers(loaded.config):
        name = checkpoint_of(loaded.config, role)
        model = surroundings.models.get(name)
        if model is None:
            raise ConfigError(
                f"a plan needs the model of {role}, but {name} is neither a directory here, nor in the hub's cache, "
                "nor in the bundled table: write the path of a directory with its config.json, or a name of the table"
            )
        models[role] = model.raw
    return make_plan(loaded.config, models, devices_per_node=devices_per_node(loaded.config))


def _report(options: argparse.Namespace, findings: Sequence[Finding], origins: Origins) -> None:
    """Print findings: as text to stderr, as JSON to stdout."""
    if options.format == "json":
        found = {"file": origins.file, "dialect": _dialect(origins), "findings": as_json(findings, origins)}
        print(json.dumps(found, indent=2, allow_nan=False))
    elif findings:
        print(render(findings, origins, show_dropped=options.show_dropped), file=sys.stderr)


def _dialect(origins: Origins) -> dict[str, object] | None:
    """Return the dialect of the file for JSON; None for an unreadable file."""
    return None if origins.dialect is None else asdict(origins.dialect)


def _explain(rule_id: str) -> int:
    if rule_id == "list":
        print("\n".join(rule_ids()))
        return EXIT_OK
    page = explain_rule(rule_id)
    if page is None:
        meant = similar_rules(rule_id)
        hint = f"did you mean {' or '.join(meant)}?" if meant else "`--explain list` names them all"
        print(f"there is no rule {rule_id!r}: {hint}", file=sys.stderr)
        return EXIT_CONFIG
    print(page)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m roll_r3.run",
        description="Train a Mixture-of-Experts model by reinforcement learning with router replay, from a YAML file.",
        epilog="Exit status: 0 done, 1 the run failed, 2 the configuration cannot work, 130 interrupted, 143 ended by "
        "SIGTERM. "
        "All fields: docs/configuration.md.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="set one field; the value is read as YAML and replaces the one in the file; list items by number",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--validate-only", action="store_true", help="check the configuration, start nothing")
    action.add_argument("--print-config", action="store_true", help="print the resolved configuration, start nothing")
    action.add_argument(
        "--plan",
        action="store_true",
        help="print the placement of processes, their memory and their traffic, start nothing",
    )
    action.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the checkpoint of resume_from_checkpoint, or `pretrain` if that is off; train nothing",
    )
    action.add_argument("--explain", metavar="RULE", help="explain a rule of the check; `list` names all")
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="files and engines are on other machines: do not look for them here",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="format of findings and of the plan")
    parser.add_argument("--show-dropped", action="store_true", help="list the dropped keys of ROLL, one by one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
