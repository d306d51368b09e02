"""YAML text to plain values, with the line of every key, and back; nothing in it is ever executed.

YAML 1.1 as PyYAML's safe loader reads it, with three differences: `1e-6` is a number (PyYAML takes it for text), a date
is text, and a key that is given twice is a mistake rather than a silent overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from roll_r3.config.report import Finding

MAX_NODES = 200_000
"""Aliases are counted as often as they are used: what grows beyond this is a mistake or an attack."""
MAX_DEPTH = 50

_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null"))
_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars described above."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in rows if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes text that this loader or PyYAML's would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, file: str, path: str = "") -> tuple[Any, dict[str, str], list[Finding]]:
    """Read one YAML document.

    Args:
        text: the document.
        file: what to call it in messages.
        path: where its value stands in the configuration; an override's does not stand at the root.

    Returns:
        Its value (None when there is none), dotted path -> `file:line` for every key and list item, and what is wrong.
        With findings the value is not to be used.
    """
    walk = _Walk(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, walk.places, []
        findings = list(walk.visit(node, path, ()))
        return (None if findings else loader.construct_document(node)), walk.places, findings
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1} of " if mark else ""
        return None, {}, [_unreadable(f"{line}{file} is not YAML: {error.problem or error.context}")]
    except (yaml.YAMLError, ValueError) as error:
        return None, {}, [_unreadable(f"{file} is not YAML: {' '.join(str(error).split())}")]
    except RecursionError:
        return None, {}, [_unreadable(f"{file}: sections are nested too deeply")]


class _Walk:
    """One pass over the tree of nodes, before any value is made of it: notes the places, yields what is wrong."""

    def __init__(self, file: str) -> None:
        self.places: dict[str, str] = {}
        self._file = file
        self._nodes = 0

    def visit(self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> Iterator[Finding]:
        """Visit `node` and all below it; it stands at `path`, inside the nodes `around`."""
        self._nodes += 1
        if self._nodes == MAX_NODES:
            yield _wrong(node, path, f"the file holds more than {MAX_NODES} values once its aliases are expanded")
        if self._nodes >= MAX_NODES:
            return
        if any(node is outer for outer in around):
            yield _wrong(node, path, "an alias that contains itself")
        elif len(around) > MAX_DEPTH:
            yield _wrong(node, path, f"sections are nested more than {MAX_DEPTH} deep")
        elif node.tag not in _TAGS:
            why = f"the tag {node.tag} is refused: plain YAML values are read, nothing is constructed or executed"
            yield _wrong(node, path, why, "write the plain value", rule="yaml-tag")
        elif isinstance(node, yaml.MappingNode):
            yield from self._visit_mapping(node, path, around)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                inner = join(path, str(index))
                self.places[inner] = self._place(item)
                yield from self.visit(item, inner, (*around, node))

    def _visit_mapping(self, node: yaml.MappingNode, path: str, around: tuple[yaml.Node, ...]) -> Iterator[Finding]:
        seen: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                yield _wrong(value, join(path, "<<"), "the merge key << is not read", "write ${section.field}")
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                why = f"a key must be text; YAML reads this one, in line {key.start_mark.line + 1}, as something else"
                yield _wrong(key, path, why, "write it in quotes")
                continue
            inner, here = join(path, key.value), self._place(key)
            self.places[inner] = here
            if key.value in seen:
                why = f"this key is given twice, first at {seen[key.value]}: YAML would silently keep the last"
                yield _wrong(value, inner, why, "remove one of them", rule="duplicate-key")
            seen.setdefault(key.value, here)
            yield from self.visit(value, inner, (*around, node))

    def _place(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}"


def to_yaml(config: BaseModel) -> str:
    """A whole configuration, defaults filled in, as YAML that loads to the same."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def join(path: str, key: str) -> str:
    """`key` below the dotted `path`."""
    return f"{path}.{key}" if path else key


def _wrong(node: yaml.Node, path: str, why: str, fix: str = "", rule: str = "yaml") -> Finding:
    value = node.value if isinstance(node, yaml.ScalarNode) else "..."
    return Finding(rule, "error", ((path, value),) if path else (), why, fix)


def _unreadable(why: str) -> Finding:
    return Finding("yaml", "error", (), why)
