"""YAML text to plain values, with the line of every key, and back; nothing in it is ever executed.

YAML 1.1 as read by PyYAML's safe loader, with four differences. `1e-6` is a number (text to PyYAML). A date is text,
and so is `1:30` (a number in base 60 to PyYAML). A repeated key is a mistake, not a silent overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from roll_r3.config.findings.report import Finding, show_value
from roll_r3.config.secrets import masked
from roll_r3.config.tree import join, unshared

MAX_NODES = 20_000
"""Largest number of values, with every use of an alias counted: more is a mistake or an attack."""
MAX_DEPTH = 50
MAX_DIGITS = 100
MAX_PATH = 512
"""Largest length of a dotted path, which is kept for every value below it."""

_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null"))
_INT = "tag:yaml.org,2002:int"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_WHOLE = re.compile(r"^[-+]?(?:0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0[0-7_]*|[1-9][0-9_]*)$")
_DECIMAL = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NOT_WRITABLE = "holds half of a surrogate pair, which has no UTF-8 encoding"
_WRITE_LETTERS = r"write the letter itself, or \U and its eight digits"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars described above. It stops at `MAX_NODES`, since a node takes a kilobyte and
    a tenth of a millisecond."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > MAX_NODES:
            raise _TooLargeError
        return super().compose_node(parent, index)


class _TooLargeError(yaml.YAMLError):
    def __str__(self) -> str:
        return f"it holds more than {MAX_NODES} values once its aliases are expanded"


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rows if tag not in (_INT, _FLOAT_TAG, "tag:yaml.org,2002:timestamp")]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper. Quotes text with another meaning to this loader or PyYAML's."""


_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Parsed:
    """One parsed YAML document: its values and its mistakes."""

    value: Any
    """Plain values without those of the findings; None for an unreadable document."""
    places: dict[str, str]
    """Dotted path -> `file:line` of every key and list item."""
    findings: list[Finding]


def parse_yaml(text: str, file: str, path: str = "") -> Parsed:
    """Read one YAML document.

    Args:
        text: the document.
        file: its name in messages.
        path: dotted path of its value in the configuration: the root, except for an override.
    """
    walk = _Walk(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Parsed(None, {}, [])
        usable = walk.visit(node, path, ())
        return Parsed(unshared(loader.construct_document(node)) if usable else None, walk.places, walk.findings)
    except _TooLargeError as error:
        return Parsed(None, {}, [_unreadable(f"{file} is too large: {error}")])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1} of " if mark else ""
        return Parsed(None, {}, [_unreadable(f"{line}{file} is not YAML: {error.problem or error.context}")])
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        return Parsed(None, {}, [_unreadable(f"{file} is not YAML: {' '.join(str(error).split())}")])
    except RecursionError:
        return Parsed(None, {}, [_unreadable(f"{file}: sections are nested too deeply")])


class _Walk:
    """One pass over the tree of nodes before values are made. Notes places and mistakes, and prunes the mistakes."""

    def __init__(self, file: str) -> None:
        self.places: dict[str, str] = {}
        self.findings: list[Finding] = []
        self._file = file
        self._nodes = 0
        self._aborted = False

    def visit(self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> bool:
        """Visit `node` at `path`, inside the nodes `around`, and all nodes below it.

        Returns:
            True if its value can be used.
        """
        if self._aborted:
            return False
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._aborted = True
            self._wrong(node, path, f"the file holds more than {MAX_NODES} values once its aliases are expanded")
        elif any(node is outer for outer in around):
            self._aborted = True
            self._wrong(node, path, "an alias that contains itself")
        elif len(around) > MAX_DEPTH:
            self._aborted = True
            self._wrong(node, path, f"sections are nested more than {MAX_DEPTH} deep")
        elif node.tag not in _TAGS:
            why = f"the tag {node.tag} is rejected: only plain YAML values are read, nothing is constructed or executed"
            self._wrong(node, path, why, "write the plain value", rule="yaml-tag")
            return False
        elif not self._fits_tag(node):
            kind = node.tag.rpartition(":")[2]
            self._wrong(node, path, f"this value is not of the type !!{kind}", "write the plain value", "yaml-tag")
            return False
        elif node.tag == _INT and len(node.value) > MAX_DIGITS:
            self._wrong(node, path, f"a number of more than {MAX_DIGITS} digits", rule="bad-value")
            return False
        elif isinstance(node, yaml.ScalarNode) and not is_writable(node.value):
            self._wrong(node, path, f"this text {_NOT_WRITABLE}", _WRITE_LETTERS, rule="bad-value")
            return False
        elif isinstance(node, yaml.MappingNode):
            node.value = list(self._usable_items(node, path, around))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                inner = join(path, str(index))
                self.places[inner] = self._place(item)
                if not self.visit(item, inner, (*around, node)):
                    node.value[index] = yaml.ScalarNode("tag:yaml.org,2002:null", "null")
        return not self._aborted

    @staticmethod
    def _fits_tag(node: yaml.Node) -> bool:
        """Return true if the value of `node` fits its tag; for explicit tags PyYAML does not check."""
        if isinstance(node, yaml.MappingNode):
            return node.tag == _Loader.DEFAULT_MAPPING_TAG
        if isinstance(node, yaml.SequenceNode):
            return node.tag == _Loader.DEFAULT_SEQUENCE_TAG
        if node.tag == _Loader.DEFAULT_SCALAR_TAG or (node.tag == _FLOAT_TAG and _DECIMAL.match(node.value)):
            return True
        return node.tag == _plain_tag(node.value)

    def _usable_items(
        self, node: yaml.MappingNode, path: str, around: tuple[yaml.Node, ...]
    ) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        seen: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self._wrong(value, join(path, "<<"), "the merge key << is not read", "write ${section.field}")
                continue
            if isinstance(key, yaml.ScalarNode) and key.tag == _INT:
                # A key of digits is a name. An alias may use the same node as a number elsewhere, so copy it.
                key = yaml.ScalarNode(_Loader.DEFAULT_SCALAR_TAG, key.value, key.start_mark, key.end_mark)
            why, fix = _rejected_key(key, path)
            if why:
                self._wrong(key, path, why, fix)
                continue
            inner, here = join(path, key.value), self._place(key)
            self.places[inner] = here
            if key.value in seen:
                why = f"this key is given twice, first at {seen[key.value]}: YAML would silently keep the last"
                self._wrong(value, inner, why, "remove one of them", rule="duplicate-key")
            seen.setdefault(key.value, here)
            if self.visit(value, inner, (*around, node)):
                yield key, value

    def _place(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}"

    def _wrong(self, node: yaml.Node, path: str, why: str, fix: str = "", rule: str = "yaml") -> None:
        value = node.value if isinstance(node, yaml.ScalarNode) else "..."
        self.findings.append(Finding(rule, "error", ((path, value),) if path else (), why, fix))


def _rejected_key(key: yaml.Node, path: str) -> tuple[str, str]:
    """Return why `key` is rejected in the section at `path`, and a fix; empty for a valid key."""
    line = f"in line {key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode) or key.tag != _Loader.DEFAULT_SCALAR_TAG:
        return f"a key must be text, but YAML reads this one, {line}, as another type", "write it in quotes"
    shown = f"the key {show_value(key.value)!r}, {line},"
    if not is_writable(key.value):
        return f"{shown} {_NOT_WRITABLE}", _WRITE_LETTERS
    if (length := len(join(path, key.value))) > MAX_PATH:
        return f"{shown} makes a dotted path of {length:,} characters, at most {MAX_PATH} are read", "shorten the keys"
    return "", ""


def is_writable(text: str) -> bool:
    """Return true if UTF-8 can encode `text`: it cannot for half of a surrogate pair, as made by an escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_tag(text: str) -> str:
    """Return the tag of a scalar without quotes and without an explicit tag."""
    rows = _Loader.yaml_implicit_resolvers.get(text[:1], [])
    return next((tag for tag, regexp in rows if regexp.match(text)), _Loader.DEFAULT_SCALAR_TAG)


def to_yaml(config: BaseModel) -> str:
    """Return a configuration as YAML, with all defaults; it loads to the same configuration, except for secrets."""
    values = config.model_dump(mode="json")
    if "system_envs" in values:
        values["system_envs"] = masked(values["system_envs"])
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _unreadable(why: str) -> Finding:
    return Finding("yaml", "error", (), why)
