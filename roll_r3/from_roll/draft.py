"""Tree of values during translation: removed values, their replacements, and the reasons."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from roll_r3.config.findings.report import ABSENT, Finding, Severity, show_value
from roll_r3.config.secrets import hidden
from roll_r3.config.tree import Keys, dotted, paths_below, unshared

ROLES = ("actor_train", "actor_infer", "reference")
ROLLS_DEFAULT = "ROLL's default"
"""Place of a value missing from the file."""

_MODEL_ROLES = ("actor_train", "reference")
_RUN_BY = {
    "<trainer>": (_MODEL_ROLES, ("megatron_train", "megatron_infer")),
    "<fsdp2>": (_MODEL_ROLES, ("fsdp2_train", "fsdp2_infer")),
    "<engine>": (("actor_infer",), ("sglang", "vllm")),
    "<sglang>": (("actor_infer",), ("sglang",)),
    "<vllm>": (("actor_infer",), ("vllm",)),
}
"""Part of a pattern -> its possible roles, and the strategies of which one must run them."""
_FEW = 3
"""Largest number of dropped keys listed without --show-dropped."""
_MAX_KEYS = 6
"""Number of keys shown in place of a section's values."""


class Draft:
    """Tree, places of its values, and findings about it. Nothing raises, for any tree."""

    def __init__(self, data: dict[str, Any], places: Mapping[str, str], *, is_rolls: bool = False) -> None:
        self.data = copy.deepcopy(data)
        self.places = dict(places)
        self.is_rolls = is_rolls
        """True for a file written for ROLL: missing keys, and shared keys with two meanings, are read as in ROLL."""
        self.tagged = any(self.get(keys) not in (None, []) for keys in self.expand("rewards.*.tag_included"))
        """True if the file names tags of any reward, even of an unsupported one: its rows have a column for them."""
        self._notes: list[Finding] = []
        self._refused: list[tuple[str, object, str]] = []
        self._unread: list[tuple[str, object]] = []

    def get(self, path: str | Keys) -> Any:
        """Return the value at a path, ABSENT if there is none."""
        node: Any = self.data
        for key in as_keys(path):
            if not isinstance(node, dict) or key not in node:
                return ABSENT
            node = node[key]
        return node

    def has(self, path: str | Keys) -> bool:
        """Return true if there is a value other than null at a path."""
        return self.get(path) not in (ABSENT, None)

    def expand(self, pattern: str) -> list[Keys]:
        """Return the keys in this tree matched by a row's pattern.

        `<role>` is any role, `<trainer>` a role run by Megatron, `<fsdp2>` one run by FSDP2. `<sglang>` and `<vllm>`
        are the rollout under this engine, `<engine>` under either. `*` is any key of a section.
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
        """Return the strategy of a role, or its default; empty text if the name is not text."""
        name = self.get((role, "strategy_args", "strategy_name"))
        if name in (ABSENT, None):
            return "sglang" if role == "actor_infer" else "megatron_train"
        return name if isinstance(name, str) else ""

    def drop(self, path: str | Keys) -> None:
        """Remove the value at a path, if there is one."""
        *above, last = as_keys(path)
        node = self.get(tuple(above))
        if isinstance(node, dict):
            node.pop(last, None)

    def keep_unknown(self, path: str | Keys, section: Any, known: tuple[str, ...]) -> None:
        """Restore the unknown names of a section of ROLL after it was handled as a whole."""
        unknown = {k: v for k, v in section.items() if k not in known} if isinstance(section, dict) else {}
        if unknown:
            self.put(path, unknown, path)

    def put(self, path: str | Keys, value: Any, origin: str | Keys) -> None:
        """Set the value at a path that `fits`, with the place of `origin`, or with `ROLLS_DEFAULT` as its place."""
        *above, last = as_keys(path)
        node: Any = self.data
        for key in above:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[last] = unshared(value)  # one value may be put at several paths, and removed from one
        old, new = dotted(as_keys(origin)), dotted(as_keys(path))
        if origin == ROLLS_DEFAULT:
            self.places[new] = ROLLS_DEFAULT
        for below in ((), *paths_below(value)):
            if (place := dotted((old, *below))) in self.places:
                self.places[dotted((new, *below))] = self.places[place]

    def fits(self, path: str | Keys) -> bool:
        """Return true if a value can be set at a path: each section above it is a mapping, null or missing."""
        keys = as_keys(path)
        above = [self.get(keys[:i]) for i in range(1, len(keys))]
        return all(node is ABSENT or node is None or isinstance(node, dict) for node in above)

    def translate(
        self, path: str | Keys, new: Mapping[str | Keys, Any], why: str, *, fix: str = "", warns: bool = False
    ) -> None:
        """Replace the value at `path` by `new`, and add a note.

        If the file sets a target to another value, the old key is rejected instead. If a target would be inside a
        value that is not a section, the old key stays.

        Args:
            fix: text in place of the new values.
            warns: add a warning, not a note: the run needs something from its user.
        """
        keys, value = as_keys(path), self.get(path)
        if not all(self.fits(target) for target in new):
            return
        for target, wanted in new.items():
            given = self.get(target)
            if as_keys(target) != keys and given not in (ABSENT, None, wanted):
                other = dotted(as_keys(target))
                self.refuse(path, f"{other} is given too, as {show_value(hidden(other, given))}: keep one of them")
                return
        if keys not in map(as_keys, new):
            self.drop(path)
        for target, wanted in new.items():
            self.put(target, wanted, keys)
        written = [(dotted(as_keys(target)), wanted) for target, wanted in new.items()]
        fix = fix or "; ".join(f"{target}: {show_value(hidden(target, wanted))}" for target, wanted in written)
        self._note(keys, value, why, fix or "leave it out", "warning" if warns else "note")

    def _note(self, keys: Keys, value: object, why: str, fix: str, severity: Severity) -> None:
        self._notes.append(Finding("roll-translated", severity, ((dotted(keys), _shown(value)),), why, fix))

    def refuse(self, path: str | Keys, reason: str) -> None:
        """Remove a value that roll_r3 does not support, and list it."""
        name = dotted(as_keys(path))
        self._refused.append((name, _shown(self.get(path)), reason))
        self.drop(path)

    def unread(self, path: str | Keys, empty: tuple[object, ...] = (None,)) -> None:
        """Remove a value, and list it as a key without effect unless it is one of `empty`."""
        name, value = dotted(as_keys(path)), self.get(path)
        if value is not ABSENT and value not in empty:
            self._unread.append((name, _shown(value)))
        self.drop(path)

    def fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Set missing fields to ROLL's defaults, with one note for all."""
        refused = {path for path, _, _ in self._refused}
        absent = {p: v for p, v in defaults.items() if p not in refused and self.get(p) is ABSENT and self.fits(p)}
        for path, value in absent.items():
            self.put(path, value, ROLLS_DEFAULT)
        if absent:
            why = "the file was written for ROLL and does not set these fields; ROLL's defaults differ from roll_r3's"
            fix = "write the values to keep into the file; `dialect: roll` keeps ROLL's defaults for all others"
            self._notes.append(Finding("roll-defaults", "note", tuple(absent.items()), why, fix))

    def findings(self) -> list[Finding]:
        """Return one note per translated key, one error for unsupported keys, one warning for dropped keys."""
        found = list(self._notes)
        if self._refused:
            reasons: dict[str, list[str]] = {}
            for path, _, reason in self._refused:
                reasons.setdefault(reason, []).append(path)
            lines = "".join(f"\n        {', '.join(paths)}: {reason}" for reason, paths in reasons.items())
            keys = tuple((path, value) for path, value, _ in self._refused)
            why = "roll_r3 does not support these keys of ROLL, and removing them changes the run"
            found.append(Finding("roll-unsupported", "error", keys, why, f"remove them, or:{lines}"))
        if self._unread:
            number = len(self._unread)
            why = f"{number:,} key{'s' * (number > 1)} of ROLL dropped, without effect on training"
            shows: Literal["fields", "on-request"] = "fields" if number <= _FEW else "on-request"
            found.append(Finding("roll-unread", "warning", tuple(self._unread), why, "remove them", shows=shows))
        return found


def matches(pattern: str, path: str) -> bool:
    """Return true if a row's pattern can match a dotted path, under any strategy of its role."""
    parts, keys = pattern.split("."), path.split(".")
    return len(parts) == len(keys) and all(
        key in ROLES if part == "<role>" else key in _RUN_BY[part][0] if part in _RUN_BY else part in ("*", key)
        for part, key in zip(parts, keys, strict=True)
    )


def as_keys(path: str | Keys) -> Keys:
    """Return keys unchanged, and dotted text split into its parts."""
    return tuple(path.split(".")) if isinstance(path, str) else path


def is_number(value: object) -> bool:
    """Return true for a number; booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> object:
    """Return a value in a printable form: the keys of a section."""
    if isinstance(value, dict):
        names = [str(key) for key in value]
        return "{" + ", ".join(names[:_MAX_KEYS]) + (", ..." if len(names) > _MAX_KEYS else "") + "}"
    return value
