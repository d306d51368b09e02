"""`${a.b}` in a value stands for another field's value; OmegaConf resolves it, and this is its only user.

Its resolvers (`${oc.env:HOME}` and the like) are refused, so that the file and the overrides alone say what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from roll_r3.config.interpolation_size import REFERENCE, EndlessError, Size, Sizes
from roll_r3.config.report import Finding
from roll_r3.config.tree import Keys, at, children, dotted, join, paths_below


def resolve(data: dict[str, Any], places: dict[str, str]) -> tuple[dict[str, Any], list[tuple[Keys, Finding]]]:
    """`data` with every interpolation replaced by what it names, and what is wrong with those that cannot be.

    A value that cannot be resolved becomes None, and so does one that refers to it; both are named. `places` gains
    where a value was taken from.
    """
    found: list[tuple[Keys, Finding]] = []
    _take_out(data, [(keys, f) for keys, text in texts(data, ()) if (f := _refuse(dotted(keys), text))], found)
    _take_out(data, list(_too_large(data)), found)
    if not any("${" in text for _, text in texts(data, ())):
        return data, found
    from omegaconf import OmegaConf  # noqa: PLC0415  takes longer to import than to use; most files need none of it

    resolved = _resolve(OmegaConf.create(data), data, (), found)
    for keys, text in texts(data, ()):
        if "${" in text:
            _note_origin(dotted(keys), text, at(resolved, keys), places)
    return resolved, found


def _take_out(data: dict[str, Any], wrong: list[tuple[Keys, Finding]], found: list[tuple[Keys, Finding]]) -> None:
    found += wrong
    for keys, _ in wrong:
        at(data, keys[:-1])[keys[-1]] = None


def _too_large(data: dict[str, Any]) -> Iterator[tuple[Keys, Finding]]:
    """What would grow beyond all bounds, or never end; OmegaConf would try."""
    sizes, total = Sizes(data), Size()
    for keys, text in texts(data, ()):
        if "${" not in text:
            continue
        try:
            together = total + sizes.of(keys)
            excess = together.excess()
        except EndlessError as error:
            excess = str(error)
        if excess:
            yield keys, _unresolved(dotted(keys), text, excess)
        else:
            total = together


def _unresolved(path: str, text: str, reason: str) -> Finding:
    fix = "write the full dotted path of another field, or a relative one as in ${..field}"
    return Finding("interpolation", "error", ((path, text),), f"this cannot be resolved: {reason}", fix)


def _note_origin(path: str, text: str, value: Any, places: dict[str, str]) -> None:
    """Add to `places` that the value at `path`, and all below it, was taken from elsewhere."""
    source = text[2:-1] if REFERENCE.fullmatch(text) else ""
    origin = f"{places.get(path, '')}, from {text}" + (f" at {places[source]}" if source in places else "")
    for inner in (path, *(join(path, dotted(keys)) for keys in paths_below(value))):
        places[inner] = origin


def texts(node: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """(keys, text) of every text in a tree of plain values."""
    if isinstance(node, str):
        yield keys, node
    for key, value in children(node):
        yield from texts(value, (*keys, key))


def _refuse(path: str, text: str) -> Finding | None:
    """A finding for text that must not reach OmegaConf."""
    if text == "???":
        why, fix = "this value is still to be filled in", f"give it in the file, or as an override {path}=..."
        return Finding("missing-field", "error", ((path, text),), why, fix)
    if "${" in REFERENCE.sub("", text):
        why = (
            "only ${section.field} is resolved: environment variables and other resolvers are not, so that the file "
            "and the overrides alone say what runs"
        )
        fix = f'write the value, or let the shell fill it in: "{path}=$VARIABLE" as an override'
        return Finding("interpolation", "error", ((path, text),), why, fix)
    return None


def _resolve(omega: Any, node: Any, keys: Keys, found: list[tuple[Keys, Finding]]) -> Any:
    """A copy of `node` with interpolations resolved by its OmegaConf twin; appends those that fail to `found`."""
    if isinstance(node, dict):
        return {key: _resolve_item(omega, key, value, (*keys, key), found) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_item(omega, i, value, (*keys, i), found) for i, value in enumerate(node)]
    return node


def _resolve_item(omega: Any, key: str | int, value: Any, keys: Keys, found: list[tuple[Keys, Finding]]) -> Any:
    from omegaconf import OmegaConf  # noqa: PLC0415  as above
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415

    if not isinstance(value, str) or "${" not in value:
        return _resolve(omega[key], value, keys, found)
    try:
        named = omega[key]
        return OmegaConf.to_container(named, resolve=True) if OmegaConf.is_config(named) else named
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else "it contains itself"
        found.append((keys, _unresolved(dotted(keys), value, reason)))
        return None
