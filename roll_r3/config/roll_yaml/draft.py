"""A tree of values on its way from ROLL's schema to roll_r3's: what was taken out, what took its place, and why."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from roll_r3.config.report import ABSENT, Finding, show_value
from roll_r3.config.tree import Keys, dotted, paths_below, unshared

ROLES = ("actor_train", "actor_infer", "reference")
ROLLS_DEFAULT = "ROLL's default"
"""The place of a value that nobody wrote."""

_MODEL_ROLES = ("actor_train", "reference")
_RUN_BY = {
    "<trainer>": (_MODEL_ROLES, ("megatron_train", "megatron_infer")),
    "<fsdp2>": (_MODEL_ROLES, ("fsdp2_train", "fsdp2_infer")),
    "<engine>": (("actor_infer",), ("sglang", "vllm")),
    "<sglang>": (("actor_infer",), ("sglang",)),
    "<vllm>": (("actor_infer",), ("vllm",)),
}
"""Part of a pattern -> the roles that it may stand for, and the strategies of which one must run them."""
_SECRETS = ("judge_api_key", "api_key")
_FEW = 3
"""Dropped keys that a report lists without being asked."""
_MAX_KEYS = 6
"""Keys of a section that are named where it stands for its values."""


class Draft:
    """The tree, the places of its values, and the findings about it. Nothing raises, whatever the tree holds."""

    def __init__(self, data: dict[str, Any], places: Mapping[str, str], *, is_rolls: bool = False) -> None:
        self.data = copy.deepcopy(data)
        self.places = dict(places)
        self.is_rolls = is_rolls
        """True if the file was written for ROLL: what it leaves out, and keys that both have but read differently, mean
        what ROLL takes them for."""
        self.tagged = any(self.get(keys) not in (None, []) for keys in self.expand("rewards.*.tag_included"))
        """The file names tags of a reward, whatever becomes of that reward: its rows have a column for them."""
        self._notes: list[Finding] = []
        self._refused: list[tuple[str, object, str]] = []
        self._unread: list[tuple[str, object]] = []

    def get(self, path: str | Keys) -> Any:
        """The value at a path, ABSENT if there is none."""
        node: Any = self.data
        for key in as_keys(path):
            if not isinstance(node, dict) or key not in node:
                return ABSENT
            node = node[key]
        return node

    def has(self, path: str | Keys) -> bool:
        """Whether a value, null excepted, stands at a path."""
        return self.get(path) not in (ABSENT, None)

    def expand(self, pattern: str) -> list[Keys]:
        """What a row's pattern names in this tree.

        `<role>` is every role, `<trainer>` every role that Megatron runs, `<fsdp2>` every role that FSDP2 runs,
        `<sglang>` or `<vllm>` the rollout if that runs it, `<engine>` if either does, `*` every key of a section.
        """
        found: list[Keys] = [()]
        for segment in pattern.split("."):
            found = [
                (*keys, name)
                for keys in found
                if isinstance(node := self.get(keys), dict)
                for name in self._names(segment, node)
                if name in node
            ]
        return found

    def _names(self, segment: str, node: dict[str, Any]) -> Iterator[str]:
        if segment == "<role>":
            yield from ROLES
        elif segment in _RUN_BY:
            roles, strategies = _RUN_BY[segment]
            yield from (role for role in roles if self.strategy(role) in strategies)
        else:
            yield from list(node) if segment == "*" else [segment]

    def strategy(self, role: str) -> str:
        """The strategy that a role names, or its default; empty for what is no name."""
        name = self.get((role, "strategy_args", "strategy_name"))
        if name in (ABSENT, None):
            return "sglang" if role == "actor_infer" else "megatron_train"
        return name if isinstance(name, str) else ""

    def drop(self, path: str | Keys) -> None:
        """Take a value out, if it is there."""
        *above, last = as_keys(path)
        node = self.get(tuple(above))
        if isinstance(node, dict):
            node.pop(last, None)

    def keep_unknown(self, path: str | Keys, section: Any, known: tuple[str, ...]) -> None:
        """Put back what a section of ROLL's, which was dealt with as a whole, held under names that ROLL has not."""
        unknown = {k: v for k, v in section.items() if k not in known} if isinstance(section, dict) else {}
        if unknown:
            self.put(path, unknown, path)

    def put(self, path: str | Keys, value: Any, origin: str | Keys) -> None:
        """Set the value at a path that `fits`; it keeps the place of `origin`, or has that for its place."""
        *above, last = as_keys(path)
        node: Any = self.data
        for key in above:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[last] = unshared(value)  # the same may be put at several places, and be taken out of one
        old, new = dotted(as_keys(origin)), dotted(as_keys(path))
        if origin == ROLLS_DEFAULT:
            self.places[new] = ROLLS_DEFAULT
        for below in ((), *paths_below(value)):
            if (place := dotted((old, *below))) in self.places:
                self.places[dotted((new, *below))] = self.places[place]

    def fits(self, path: str | Keys) -> bool:
        """Whether a value could stand at a path: no section around it is anything else than a section."""
        keys = as_keys(path)
        above = [self.get(keys[:i]) for i in range(1, len(keys))]
        return all(node is ABSENT or node is None or isinstance(node, dict) for node in above)

    def translate(self, path: str | Keys, new: Mapping[str | Keys, Any], why: str) -> None:
        """Put `new` in the place of the value at `path`, and say so.

        Where `new` names a value that is given with another value, the old key is refused instead; where it would stand
        inside something that is no section, the old key stays.
        """
        keys, value = as_keys(path), self.get(path)
        if not all(self.fits(target) for target in new):
            return
        for target, wanted in new.items():
            given = self.get(target)
            if as_keys(target) != keys and given not in (ABSENT, None, wanted):
                self.refuse(
                    path, f"{dotted(as_keys(target))} is given too, as {show_value(given)}: keep one of the two"
                )
                return
        if keys not in map(as_keys, new):
            self.drop(path)
        for target, wanted in new.items():
            self.put(target, wanted, keys)
        fix = "; ".join(f"{dotted(as_keys(target))}: {show_value(wanted)}" for target, wanted in new.items())
        self._note(keys, value, why, fix or "leave it out")

    def _note(self, keys: Keys, value: object, why: str, fix: str) -> None:
        path = dotted(keys)
        self._notes.append(Finding("roll-translated", "note", ((path, _shown(path, value)),), why, fix))

    def refuse(self, path: str | Keys, reason: str) -> None:
        """Take out what roll_r3 does not do, and list it."""
        name = dotted(as_keys(path))
        self._refused.append((name, _shown(name, self.get(path)), reason))
        self.drop(path)

    def unread(self, path: str | Keys) -> None:
        """Take out what changes nothing here, and list it."""
        name = dotted(as_keys(path))
        self._unread.append((name, _shown(name, self.get(path))))
        self.drop(path)

    def fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Set what is left out to ROLL's defaults, and say so once."""
        refused = {path for path, _, _ in self._refused}
        absent = {p: v for p, v in defaults.items() if p not in refused and self.get(p) is ABSENT and self.fits(p)}
        for path, value in absent.items():
            self.put(path, value, ROLLS_DEFAULT)
        if absent:
            why = "the file was written for ROLL and leaves these out, where ROLL's defaults are not roll_r3's"
            fix = "write those that you mean to keep into the file; `dialect: roll` keeps ROLL's for all others"
            self._notes.append(Finding("roll-defaults", "note", tuple(absent.items()), why, fix))

    def findings(self) -> list[Finding]:
        """Notes key by key, what is refused in one list, what is unread in another."""
        found = list(self._notes)
        if self._refused:
            reasons: dict[str, list[str]] = {}
            for path, _, reason in self._refused:
                reasons.setdefault(reason, []).append(path)
            lines = "".join(f"\n        {', '.join(paths)}: {reason}" for reason, paths in reasons.items())
            keys = tuple((path, value) for path, value, _ in self._refused)
            why = "roll_r3 does not do what these keys of ROLL ask for, and leaving them out changes the run"
            found.append(Finding("roll-unsupported", "error", keys, why, f"take them out, or:{lines}"))
        if self._unread:
            number = len(self._unread)
            why = f"{number:,} key{'s' * (number > 1)} of ROLL dropped, on which training does not depend"
            shows: Literal["fields", "on-request"] = "fields" if number <= _FEW else "on-request"
            found.append(Finding("roll-unread", "warning", tuple(self._unread), why, "take them out", shows=shows))
        return found


def matches(pattern: str, path: str) -> bool:
    """Return true if a row's pattern can name the key at a dotted path, whatever strategy runs the role."""
    parts, keys = pattern.split("."), path.split(".")
    return len(parts) == len(keys) and all(
        key in ROLES if part == "<role>" else key in _RUN_BY[part][0] if part in _RUN_BY else part in ("*", key)
        for part, key in zip(parts, keys, strict=True)
    )


def as_keys(path: str | Keys) -> Keys:
    """Keys as they are; of dotted text, its parts."""
    return tuple(path.split(".")) if isinstance(path, str) else path


def is_number(value: object) -> bool:
    """Whether a value is a number; yes and no are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(path: str, value: object) -> object:
    """A value as it may be printed: of a section its keys, of a secret nothing."""
    if isinstance(value, dict):
        names = [str(key) for key in value]
        return "{" + ", ".join(names[:_MAX_KEYS]) + (", ..." if len(names) > _MAX_KEYS else "") + "}"
    return "..." if path.rpartition(".")[2] in _SECRETS else value
