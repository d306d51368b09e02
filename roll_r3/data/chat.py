"""Conversion of conversations to token ids by the checkpoint's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from roll_r3.config.findings.readable import readable
from roll_r3.config.workers import DataArgs
from roll_r3.data.columns import Message
from roll_r3.data.faults import DataError
from roll_r3.errors import ConfigError

_SYSTEM = ("system", "developer")


class ChatTokenizer(Protocol):
    """Methods of a Hugging Face tokenizer used for prompts."""

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


class Chat:
    """A chat template with the system prompt and the arguments of a configuration."""

    def __init__(self, tokenizer: ChatTokenizer, args: DataArgs) -> None:
        """
        Raises:
            ConfigError: the template does not read one of its arguments.
        """
        self._tokenizer = tokenizer
        self._system = args.system_prompt
        self._kwargs = args.chat_template_kwargs
        self._probed: dict[tuple[str, ...], str] = {}
        """Roles of a conversation -> the roles among them omitted by the template."""
        self.own_system = 0
        """Number of rows with a system message of their own."""
        if self._kwargs:
            self._check_arguments()

    def conversation(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return the messages, preceded by the system prompt unless they have a system message."""
        if self._system is None:
            return tuple(messages)
        if any(message["role"] in _SYSTEM for message in messages):
            self.own_system += 1
            return tuple(messages)
        return ({"role": "system", "content": self._system}, *messages)

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode a conversation up to the beginning of the answer.

        Raises:
            DataError: the template rejects it or omits a message, or the prompt is empty.
        """
        try:
            encoded = self._apply(messages, return_dict=True)
        except Exception as error:  # a template is a program and may raise anything; each error concerns this row
            problem = f"the chat template rejects it, {readable(error, 200)}"
            raise DataError(
                "template", problem, "use roles and an order of messages supported by the template"
            ) from error
        if lost := self._omitted(tuple(message["role"] for message in messages)):
            problem = f"the chat template omits messages with role {lost}"
            raise DataError(f"lost:{lost}", problem, "write system, user or assistant, or another role of the template")
        ids = tuple(encoded["input_ids"])
        if not ids:
            raise DataError("no-tokens", "the prompt is empty", "write text")
        return ids

    def _omitted(self, roles: tuple[str, ...]) -> str:
        """Return the roles omitted by the template, joined by commas."""
        if roles not in self._probed:
            signs = [f"sign{i}of{len(roles)}" for i in range(len(roles))]
            probe = [{"role": role, "content": sign} for role, sign in zip(roles, signs, strict=True)]
            try:
                text = self._apply(probe, tokenize=False)
            except Exception:  # noqa: BLE001  the template reads contents; only real ones can tell
                text = "".join(signs)
            lost = sorted({role for role, sign in zip(roles, signs, strict=True) if sign not in text})
            self._probed[roles] = readable(", ".join(lost))
        return self._probed[roles]

    def _apply(self, messages: Sequence[Message], **kwargs: Any) -> Any:
        conversation = [dict(message) for message in messages]
        return self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, **self._kwargs, **kwargs)

    def _check_arguments(self) -> None:
        try:
            template = self._tokenizer.get_chat_template()
        except Exception as error:  # the tokenizer's files may hold anything
            raise ConfigError(
                f"actor_train.data_args.chat_template_kwargs: the checkpoint has no chat template, {readable(error)}"
            ) from error
        unread = [name for name in self._kwargs if not re.search(rf"\b{re.escape(name)}\b", template)]
        if unread:
            raise ConfigError(
                f"actor_train.data_args.chat_template_kwargs: the checkpoint's chat template does not read "
                f"{readable(', '.join(unread))}: remove it, or correct the name"
            )
