"""`${a.b}` in a value stands for another field's value; OmegaConf resolves it, and this is its only user.

Its resolvers (`${oc.env:HOME}` and the like) are refused, so that the file and the overrides alone say what runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from roll_r3.config.report import Finding
from roll_r3.config.yaml_file import join

_REFERENCE = re.compile(r"\$\{\.*[\w-]+(?:\.[\w-]+|\[[\w-]+\])*\}")


def resolve(data: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """`data` with every interpolation replaced by what it names, and what is wrong with those that cannot be."""
    findings = [finding for path, text in texts(data, "") if (finding := _refuse(path, text))]
    if findings or not any("${" in text for _, text in texts(data, "")):
        return data, findings
    from omegaconf import OmegaConf  # noqa: PLC0415  takes longer to import than to use; most files need none of it

    return _resolve(OmegaConf.create(data), data, "", findings), findings


def texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every text in a tree of plain values."""
    if isinstance(node, str):
        yield path, node
    for key, value in children(node):
        yield from texts(value, join(path, key))


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """(key or index, value) of a section or list; nothing for a plain value."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from ((str(index), item) for index, item in enumerate(node))


def _refuse(path: str, text: str) -> Finding | None:
    """A finding for text that must not reach OmegaConf."""
    if text == "???":
        why, fix = "this value is still to be filled in", f"give it in the file, or as an override {path}=..."
        return Finding("missing-field", "error", ((path, text),), why, fix)
    if "${" in _REFERENCE.sub("", text):
        why = (
            "only ${section.field} is resolved: environment variables and other resolvers are not, so that the file "
            "and the overrides alone say what runs"
        )
        fix = f'write the value, or let the shell fill it in: "{path}=$VARIABLE" as an override'
        return Finding("interpolation", "error", ((path, text),), why, fix)
    return None


def _resolve(omega: Any, node: Any, path: str, findings: list[Finding]) -> Any:
    """A copy of `node` with interpolations resolved by its OmegaConf twin; appends those that fail to `findings`."""
    if isinstance(node, dict):
        return {key: _resolve_item(omega, key, value, join(path, key), findings) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_item(omega, i, value, join(path, str(i)), findings) for i, value in enumerate(node)]
    return node


def _resolve_item(omega: Any, key: str | int, value: Any, path: str, findings: list[Finding]) -> Any:
    from omegaconf import OmegaConf  # noqa: PLC0415  as above
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415

    if not isinstance(value, str) or "${" not in value:
        return _resolve(omega[key], value, path, findings)
    try:
        found = omega[key]
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        why = f"this cannot be resolved: {str(error).splitlines()[0]}"
        fix = "write the full dotted path of another field, or a relative one as in ${..field}"
        findings.append(Finding("interpolation", "error", ((path, value),), why, fix))
        return None
