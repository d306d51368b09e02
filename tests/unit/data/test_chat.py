"""Chat templates: arguments, system prompts, and messages omitted by a template."""

from __future__ import annotations

import json

import pytest

from roll_r3.config.workers import DataArgs
from roll_r3.data.prompts import read_prompts
from roll_r3.errors import ConfigError
from roll_r3.models.tiny import byte_tokenizer

QWEN = """\
{%- for m in messages %}{% if m.content is string %}{% set c = m.content %}{% else %}{% set c = '' %}{% endif %}
{%- if m.role in ['system', 'user', 'assistant'] %}{{ m.role[0] + ':' + c + ';' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'a:' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<none>' }}
{%- endif %}{% endif %}"""
"""Like Qwen3's: drops content other than text and unknown roles; thinking can be turned off."""


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = QWEN
    return made


def prompts_of(tmp_path, tokenizer, *conversations, say=lambda text: None, **args):
    """Return the texts of the prompts made from conversations, and the prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": m, "ground_truth": ""}) + "\n" for m in conversations))
    prompts = read_prompts(DataArgs(file_name=str(path), messages="messages", **args), tokenizer, 100, say)
    return [tokenizer.decode(prompt.token_ids) for prompt in prompts], prompts


USER = [{"role": "user", "content": "1+1="}]
OWN = [{"role": "system", "content": "own"}, *USER]


def test_arguments_of_the_template_are_passed_on(tmp_path, tokenizer):
    assert prompts_of(tmp_path, tokenizer, USER)[0] == ["u:1+1=;a:"]
    thinking = prompts_of(tmp_path, tokenizer, USER, chat_template_kwargs={"enable_thinking": True})
    assert thinking[0] == ["u:1+1=;a:"]
    none = prompts_of(tmp_path, tokenizer, USER, chat_template_kwargs={"enable_thinking": False})
    assert none[0] == ["u:1+1=;a:<none>"]


def test_arguments_unknown_to_the_template_are_rejected(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="chat template does not read enable_thinkin, x: remove it"):
        prompts_of(tmp_path, tokenizer, USER, chat_template_kwargs={"enable_thinkin": False, "x": 1})
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        prompts_of(tmp_path, tokenizer, USER, chat_template_kwargs={"enable_thinking": False})


def test_a_system_prompt_goes_before_rows_that_have_none(tmp_path, tokenizer):
    messages: list[str] = []
    texts, prompts = prompts_of(tmp_path, tokenizer, USER, OWN, USER, say=messages.append, system_prompt="be brief")
    assert texts == ["s:be brief;u:1+1=;a:", "s:own;u:1+1=;a:", "s:be brief;u:1+1=;a:"]
    assert prompts[0].messages == ({"role": "system", "content": "be brief"}, *USER)
    assert prompts[0].row["messages"] == USER, "the row is as in the file"
    assert messages == ["1 of 3 rows keep their own system message instead of data_args.system_prompt"]


def test_a_system_prompt_goes_before_bundled_tasks_and_prompts_of_text(tokenizer):
    args = DataArgs(file_name="bundled:addition_mod10", system_prompt="S")
    prompt = read_prompts(args, tokenizer, 100)[0]
    assert tokenizer.decode(prompt.token_ids) == "s:S;u:0+0=;a:"
    assert prompt.text == "0+0="


def test_messages_omitted_by_the_template_are_rejected(tmp_path, tokenizer):
    """Qwen3's template silently drops unknown roles."""
    strange = [{"role": "human", "content": "x"}, *USER]
    with pytest.raises(
        ConfigError, match=r"line 2: the chat template omits messages with role human.*\(2 rows: lines 2, 3\)"
    ):
        prompts_of(tmp_path, tokenizer, USER, strange, strange)


def test_errors_of_the_template_name_the_row(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' else messages }}"
    with pytest.raises(ConfigError, match="line 2: the chat template rejects it, TemplateError: no system here"):
        prompts_of(tmp_path, tokenizer, USER, OWN)


def test_an_empty_system_prompt_is_rejected():
    with pytest.raises(ValueError, match="at least 1 character"):
        DataArgs(system_prompt="")
