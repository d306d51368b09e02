"""Values of the columns that a configuration names: text as it is in the file, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from roll_r3.config.readable import printable, readable
from roll_r3.data.faults import Refused, quoted, shown
from roll_r3.data.json_text import Number, parse

Message = Mapping[str, str]
"""{role, content}"""
_ANSWERS = frozenset({"assistant", "gpt", "bot", "model", "chatgpt", "ai"})
"""Roles of the model in conversations."""
_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""The beginning of a conversation as JSON, or as Python shows it."""


def find(row: Mapping[str, Any], column: str, setting: str) -> Any:
    """The value of a column, or of a field within one for a dotted name; a column with the dotted name goes first.

    Args:
        setting: name of the field of `data_args` that names it.

    Raises:
        Refused: there is none, or it is null.
    """
    value: Any = row
    for name in (column,) if column in row else column.split("."):
        if value is not row and not isinstance(value, dict):
            said = f"column {shown(column)} is missing, {shown(value)} has no fields"
            raise Refused(f"no-fields:{column}", said, f"write an object there, or correct data_args.{setting}")
        if name not in value:
            said = f"column {shown(column)} is missing, {f'there are {quoted(value)}' if value else 'there is none'}"
            raise Refused(f"missing:{column}", said, f"write it in each row, or correct data_args.{setting}")
        value = value[name]
        if value is None:
            said = f"column {shown(column)} is null"
            raise Refused(f"null:{column}", said, "write text, or leave the row out")
    return value


def prompt_of(row: Mapping[str, Any], column: str) -> list[Message]:
    """The text of a prompt, as the user's message.

    Raises:
        Refused: it is not text, or a conversation.
    """
    value = find(row, column, "prompt")
    if isinstance(value, list | dict) or (isinstance(value, str) and _is_chat(value)):
        said = f"column {shown(column)} is {shown(value)}, a {'conversation' if value else 'list'}, not text"
        raise Refused(f"chat:{column}", said, f"name the column in data_args.messages: {shown(column)}")
    if not isinstance(value, str):
        raise _not_text(column, value)
    return [{"role": "user", "content": value}]


def _is_chat(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    if _CHAT.match(text):
        return True
    try:
        value = parse(text)
    except Refused:
        return False
    return isinstance(value, list) and any(isinstance(part, dict) and "role" in part for part in value)


def label_of(row: Mapping[str, Any], column: str, setting: str) -> str:
    """A text, or a number as it is written.

    Raises:
        Refused: it is something else, or a number of which nobody wrote the digits.
    """
    value = find(row, column, setting)
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    if isinstance(value, Number) and not {"e", "E"} & set(value.text):
        return value.text
    raise _not_text(column, value)


def name_of(row: Mapping[str, Any], column: str) -> str:
    """A prompt's name.

    Raises:
        Refused: see `label_of`; or it is empty.
    """
    name = label_of(row, column, "id")
    if not name:
        said = f"column {shown(column)} is empty"
        raise Refused(f"no-name:{column}", said, "write a name, or leave data_args.id out")
    return name


def _not_text(column: str, value: Any) -> Refused:
    kind = type(value).__name__
    advice = "write text"
    if isinstance(value, Number):
        kind = "a number with an exponent" if {"e", "E"} & set(value.text) else "a number"
        value, advice = value.text, f'write text: "{readable(value.text, 60)}"'
    elif isinstance(value, bool):
        kind, advice = "true or false", f'write text: "{str(value).lower()}" or what the reward compares with'
    elif isinstance(value, int):
        kind, advice = "a number", f'write text: "{value}"'
    elif isinstance(value, float):
        kind, advice = "a float, whose digits are not in the file", "write the column as text"
    elif isinstance(value, dict):
        kind = "an object"
        inner = f"{column}.{next(iter(value), 'field')}"
        advice = f"name a field of it, like {shown(inner)}, or write JSON text"
    elif isinstance(value, list):
        kind, advice = "a list", "write text, or JSON text of the list"
    elif isinstance(value, bytes):
        kind = "binary"
    text = shown(value) if not isinstance(value, str) else readable(value, 60)
    return Refused(f"{kind}:{column}", f"column {shown(column)} is {text}, {kind}, not text", advice)


def messages_of(row: Mapping[str, Any], column: str) -> list[Message]:
    """The conversation of a column: a list of {role, content}, or JSON text of one, as in ROLL's data.

    Raises:
        Refused: it is something else, or it has the answer already.
    """
    value = find(row, column, "messages")
    if isinstance(value, str):
        try:
            value = parse(value)
        except Refused as refused:
            said = f"column {shown(column)} is {shown(value)}, {refused.said}"
            raise Refused(f"chat-text:{column}", said, _WANTED) from refused
    if not isinstance(value, list) or not value:
        raise Refused(f"chat:{column}", f"column {shown(column)} is {shown(value)}, not a list of messages", _WANTED)
    messages = [_message(message, f"{printable(column)}[{i}]") for i, message in enumerate(value)]
    if messages[-1]["role"].lower() in _ANSWERS:
        said = f"column {shown(column)} ends with a message of the {messages[-1]['role']}, which the model is to write"
        raise Refused(f"answered:{column}", said, "leave that message out; what it says may be the ground truth")
    return messages


_WANTED = 'write [{"role": "user", "content": "..."}], the last message not the assistant\'s'


def _message(value: Any, where: str) -> Message:
    kind = where.partition("[")[0]
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise Refused(f"message:{kind}", f"{where} is {shown(value)}, without role and content", _WANTED)
    if more := [name for name, inner in value.items() if name not in ("role", "content") and inner is not None]:
        said = f"{where} has {quoted(more)} besides role and content, which would be lost"
        raise Refused(f"message-keys:{kind}", said, "leave it out, or write it into the content")
    role = value["role"]
    if not isinstance(role, str) or not role:
        raise Refused(f"role:{kind}", f"{where} has the role {shown(role)}", "write system, user or assistant")
    return {"role": role, "content": _content(value["content"], where, kind)}


def _content(value: Any, where: str, kind: str) -> str:
    """The text of a message; parts of text are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise Refused(f"content:{kind}", f"the content of {where} is {shown(value)}, not text", "write text")
    return "".join(_part(part, where, kind) for part in value)


def _part(value: Any, where: str, kind: str) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    used = {name for name, inner in value.items() if inner is not None} if isinstance(value, dict) else set()
    if isinstance(text, str) and used == {"type", "text"} and value["type"] == "text":
        return text
    said = f"the content of {where} has the part {shown(value)}, not text"
    raise Refused(
        f"part:{kind}", said, 'write text, or parts like {"type": "text", "text": "..."}; images are not read'
    )
