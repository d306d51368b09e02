"""Trackers, and environment variables: a tracker's key becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Row, Step

_TRACKERS = ("wandb", "swanlab", "trackio", "mlflow")
_RENAMED = {"wandb": {"log_dir": "dir"}}
"""Tracker -> ROLL's names of its arguments, and those of its own start function."""
_KEYS = {"wandb": ("api_key", "WANDB_API_KEY"), "swanlab": ("login_kwargs.api_key", "SWANLAB_API_KEY")}
"""Tracker -> argument with its key, and environment variable of it."""
_ARGUMENTS = "tracker_kwargs"
_OF_ROLL = ("USE_MODELSCOPE", "MODEL_DOWNLOAD_TYPE", "RAY_PROFILING")
"""Environment variables with an effect in ROLL's own code alone, such as a place for downloads."""
_HERE = "variables are set in every process: the run's, its workers', engines' and rewards'"


def _tracker(draft: Draft) -> None:
    name = draft.get("track_with")
    name = "tensorboard" if name is ABSENT else name
    if not isinstance(name, str):
        return
    if draft.is_rolls:
        _arguments(draft, name)
    if name == "stdout":
        draft.translate("track_with", {"track_with": []}, "progress is always shown, and metrics.jsonl is written")
    elif draft.has("track_with") and (name == "tensorboard" or (name in _TRACKERS and draft.is_rolls)):
        draft.translate("track_with", {"track_with": [name]}, "the value is a list")
    elif draft.is_rolls:
        draft.unread("track_with")  # in roll_r3's own file the models report it


def _arguments(draft: Draft, name: str) -> None:
    """Translate a tracker's arguments to its own section, without its key."""
    given = draft.get(_ARGUMENTS)
    if name not in _TRACKERS or not isinstance(given, dict):
        draft.unread(_ARGUMENTS, empty=(None, {}))
        return
    if name in _KEYS:
        argument, variable = _KEYS[name]
        _move_key(draft, f"{_ARGUMENTS}.{argument}", variable)
    kept = {
        _RENAMED.get(name, {}).get(key, key): value
        for key, value in draft.get(_ARGUMENTS).items()
        if value not in (None, {})
    }
    draft.drop(_ARGUMENTS)
    if kept:
        draft.put(_ARGUMENTS, given, _ARGUMENTS)
        draft.translate(_ARGUMENTS, {_ARGUMENTS: {name: kept}}, f"arguments of {name}'s own start function")


def _move_key(draft: Draft, path: str, variable: str) -> None:
    if draft.has(path):
        why = "a key is an environment variable; a report shows none, and a saved configuration hides it"
        draft.translate(path, {("system_envs", variable): draft.get(path)}, why)
    draft.drop(path)


def _variables(draft: Draft) -> None:
    """Drop variables of ROLL's own code; join those of a role with the run's."""
    roles = draft.expand("<role>.system_envs") + draft.expand("rewards.*.system_envs")
    for keys in [("system_envs",), *roles]:
        section = draft.get(keys)
        for name in list(section) if isinstance(section, dict) else []:
            if name in _OF_ROLL:
                draft.unread((*keys, name))
    for keys in roles:
        _join(draft, keys)
    if draft.is_rolls and draft.get("system_envs") in (None, {}):
        draft.drop("system_envs")


def _join(draft: Draft, keys: Keys) -> None:
    section = draft.get(keys)
    if section is None or section == {}:
        draft.drop(keys)
    elif isinstance(section, dict):
        wanted: Mapping[str | Keys, Any] = {("system_envs", name): value for name, value in section.items()}
        draft.translate(keys, wanted, _HERE)


STEPS: tuple[Step, ...] = (_variables, _tracker)

ROWS = (
    Row(
        "track_with",
        ByStep("a list, as in `track_with: [wandb]`; `stdout` is `[]`; unknown trackers are dropped"),
    ),
    Row(
        _ARGUMENTS,
        ByStep(
            "a section for each tracker; `api_key` becomes `WANDB_API_KEY` or `SWANLAB_API_KEY` in `system_envs`. No "
            "effect for TensorBoard: all output is under output_dir/exp_name"
        ),
    ),
    Row(
        "system_envs",
        ByStep(f"the same; {_HERE}. `USE_MODELSCOPE` and `RAY_PROFILING` have no effect"),
    ),
    Row("<role>.system_envs rewards.*.system_envs", ByStep(f"joined with the root's `system_envs`: {_HERE}")),
)
