"""Prompts."""

from __future__ import annotations

from roll_r3.config.derived import changed
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread
from roll_r3.config.workers import BUNDLED_DOMAIN, DataArgs


def no_prompts(args: DataArgs) -> Verdict:
    """Return the verdict on a section without files."""
    names = args.file_name
    return not names if isinstance(names, str) else not names or "" in names


COLUMNS = ("prompt", "messages", "ground_truth", "domain", "id")
"""Fields of a `DataArgs` with the name of a column."""
BUNDLED_COLUMNS = "a bundled task has one column to name, for the domain, so these settings have no effect"
"""Reason of the rules on columns named for bundled tasks."""
_COLUMNS = tuple(f"actor_train.data_args.{name}" for name in COLUMNS)


_TEMPLATE_PARTS = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""Arguments of apply_chat_template passed by roll_r3, or without a plain value."""


def clashing_arguments(args: DataArgs) -> Verdict:
    """Return the verdict on arguments of the chat template that roll_r3 passes itself."""
    return ", ".join(name for name in args.chat_template_kwargs if name in _TEMPLATE_PARTS)


def columns_of_bundled(config: RLVRConfig, section: str, args: DataArgs) -> Verdict:
    """Return the verdict on columns named for bundled tasks.

    Args:
        section: dotted path of `args`.
    """
    names = args.file_name
    bundled = all(name.startswith("bundled:") for name in ([names] if isinstance(names, str) else names))
    columns = [f"{section}.{name}" for name in COLUMNS if not (name == "domain" and args.domain == BUNDLED_DOMAIN)]
    return ", ".join(column for column in columns if bundled and names and changed(config, column))


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="data-named",
        fields=("actor_train.data_args.file_name",),
        why="there are no prompts to train on",
        fix="name one or more .jsonl, .jsonl.gz, .json or .parquet files, or bundled:NAME",
        wrong=("actor_train.data_args={}",),
        right=("actor_train.data_args.file_name=[a.jsonl]",),
        violates=lambda c: no_prompts(c.actor_train.data_args),
    ),
    Rule(
        id="bundled-columns-unread",
        fields=("actor_train.data_args.file_name", *_COLUMNS),
        why=BUNDLED_COLUMNS,
        fix=f"leave them out, except actor_train.data_args.domain: {BUNDLED_DOMAIN}",
        wrong=("actor_train.data_args.id=name",),
        right=("actor_train.data_args={file_name: prompts.jsonl, id: name}",),
        violates=lambda c: columns_of_bundled(c, "actor_train.data_args", c.actor_train.data_args),
    ),
    Rule(
        id="chat-template-kwargs-free",
        fields=("actor_train.data_args.chat_template_kwargs",),
        why="these arguments are set by roll_r3, or take more than a plain value",
        fix="leave them out; the prompt comes from data_args.prompt or data_args.messages",
        wrong=("actor_train.data_args={file_name: a, chat_template_kwargs: {add_generation_prompt: false}}",),
        right=("actor_train.data_args={file_name: a, chat_template_kwargs: {enable_thinking: false}}",),
        violates=lambda c: clashing_arguments(c.actor_train.data_args),
    ),
    unread(
        "prompt-column-unread",
        "actor_train.data_args.prompt",
        "actor_train.data_args.messages",
        lambda c: c.actor_train.data_args.messages is None,
        "leave one of the two out: `messages` replaces `prompt`",
        wrong=("actor_train.data_args={file_name: a, prompt: q, messages: m}",),
        right=("actor_train.data_args={file_name: a, messages: m}",),
    ),
)
