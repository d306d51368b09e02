"""Values of the configured columns: text exactly as in the file, or an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from roll_r3.config.findings.readable import printable, readable
from roll_r3.data.faults import DataError, quoted, shown
from roll_r3.data.json_text import Number, parse

Message = Mapping[str, str]
"""{role, content}"""
_ANSWERS = frozenset({"assistant", "gpt", "bot", "model", "chatgpt", "ai"})
"""Names of the model's role in conversations."""
_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""Beginning of a conversation in JSON or in Python's notation."""


def find(row: Mapping[str, Any], column: str, setting: str) -> Any:
    """Return the value of a column; a dotted name reads a field inside a column.

    A column with exactly the dotted name takes precedence.

    Args:
        setting: field of `data_args` with the column's name.

    Raises:
        DataError: the value is missing or null.
    """
    value: Any = row
    for name in (column,) if column in row else column.split("."):
        if value is not row and not isinstance(value, dict):
            problem = f"column {shown(column)} is missing, {shown(value)} has no fields"
            raise DataError(f"no-fields:{column}", problem, f"write an object there, or correct data_args.{setting}")
        if name not in value:
            columns = f"there are {quoted(value)}" if value else "there are no columns"
            problem = f"column {shown(column)} is missing, {columns}"
            raise DataError(f"missing:{column}", problem, f"add it to each row, or correct data_args.{setting}")
        value = value[name]
        if value is None:
            problem = f"column {shown(column)} is null"
            raise DataError(f"null:{column}", problem, "write text, or remove the row")
    return value


def prompt_of(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the text of a prompt as the user's message.

    Raises:
        DataError: the value is not text, or is a conversation.
    """
    value = find(row, column, "prompt")
    if isinstance(value, list | dict) or (isinstance(value, str) and _is_chat(value)):
        problem = f"column {shown(column)} is {shown(value)}, a {'conversation' if value else 'list'}, not text"
        raise DataError(f"chat:{column}", problem, f"name the column in data_args.messages: {shown(column)}")
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
    except DataError:
        return False
    return isinstance(value, list) and any(isinstance(part, dict) and "role" in part for part in value)


def label_of(row: Mapping[str, Any], column: str, setting: str) -> str:
    """Return a text, or a number with the digits of the file.

    Raises:
        DataError: the value is neither, or is a number whose digits are not in the file.
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
    """Return the identifier of a prompt.

    Raises:
        DataError: as `label_of`, or the value is empty.
    """
    name = label_of(row, column, "id")
    if not name:
        problem = f"column {shown(column)} is empty"
        raise DataError(f"no-name:{column}", problem, "write a name, or remove data_args.id")
    return name


def _not_text(column: str, value: Any) -> DataError:
    kind = type(value).__name__
    advice = "write text"
    if isinstance(value, Number):
        kind = "a number with an exponent" if {"e", "E"} & set(value.text) else "a number"
        value, advice = value.text, f'write text: "{readable(value.text, 60)}"'
    elif isinstance(value, bool):
        kind, advice = "a boolean", f'write text: "{str(value).lower()}", or the text that the reward compares with'
    elif isinstance(value, int):
        kind, advice = "a number", f'write text: "{value}"'
    elif isinstance(value, float):
        kind, advice = "a float without its written digits", "write the column as text"
    elif isinstance(value, dict):
        kind = "an object"
        inner = f"{column}.{next(iter(value), 'field')}"
        advice = f"name one of its fields, such as {shown(inner)}, or write JSON text"
    elif isinstance(value, list):
        kind, advice = "a list", "write text, or JSON text of the list"
    elif isinstance(value, bytes):
        kind = "binary"
    text = shown(value) if not isinstance(value, str) else readable(value, 60)
    return DataError(f"{kind}:{column}", f"column {shown(column)} is {text}, {kind}, not text", advice)


def messages_of(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return a conversation: a list of {role, content}, or JSON text of one as in ROLL's data.

    Raises:
        DataError: the value is not a conversation, or already ends with the answer.
    """
    value = find(row, column, "messages")
    if isinstance(value, str):
        try:
            value = parse(value)
        except DataError as error:
            problem = f"column {shown(column)} is {shown(value)}, {error.problem}"
            raise DataError(f"chat-text:{column}", problem, _WANTED) from error
    if not isinstance(value, list) or not value:
        raise DataError(f"chat:{column}", f"column {shown(column)} is {shown(value)}, not a list of messages", _WANTED)
    messages = [_message(message, f"{printable(column)}[{i}]") for i, message in enumerate(value)]
    if messages[-1]["role"].lower() in _ANSWERS:
        problem = f"column {shown(column)} ends with a message of the {messages[-1]['role']}, the part to be sampled"
        raise DataError(f"answered:{column}", problem, "remove that message; its text may be the ground truth")
    return messages


_WANTED = 'write [{"role": "user", "content": "..."}], the last message not the assistant\'s'


def _message(value: Any, where: str) -> Message:
    kind = where.partition("[")[0]
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise DataError(f"message:{kind}", f"{where} is {shown(value)}, without role and content", _WANTED)
    if more := [name for name, inner in value.items() if name not in ("role", "content") and inner is not None]:
        problem = f"{where} has {quoted(more)} besides role and content; they would be lost"
        raise DataError(f"message-keys:{kind}", problem, "remove it, or write it into the content")
    role = value["role"]
    if not isinstance(role, str) or not role:
        raise DataError(f"role:{kind}", f"{where} has the role {shown(role)}", "write system, user or assistant")
    return {"role": role, "content": _content(value["content"], where, kind)}


def _content(value: Any, where: str, kind: str) -> str:
    """Return the text of a message; text parts are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"content:{kind}", f"the content of {where} is {shown(value)}, not text", "write text")
    return "".join(_part(part, where, kind) for part in value)


def _part(value: Any, where: str, kind: str) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    used = {name for name, inner in value.items() if inner is not None} if isinstance(value, dict) else set()
    if isinstance(text, str) and used == {"type", "text"} and value["type"] == "text":
        return text
    problem = f"the content of {where} has the part {shown(value)}, not text"
    raise DataError(
        f"part:{kind}", problem, 'write text, or parts like {"type": "text", "text": "..."}; images are not supported'
    )
