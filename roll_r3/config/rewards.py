"""Reward rules, and judges over HTTP."""

from __future__ import annotations

from typing import Any

from pydantic import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.sections import GroupFilter

BUILT_IN_REWARDS = frozenset({"code", "exact_match", "ifeval", "llm_judge", "math", "multiple_choice"})
JUDGE = "llm_judge"
"""Built-in reward asked over HTTP."""
_SECONDS = {"code": 120.0, "math": 2.0}
"""Default of `timeout` where it is not 30."""


class JudgeConfig(Config):
    """Judging model behind the API of OpenAI (`/chat/completions`): a service, or a local SGLang or vLLM server."""

    base_url: str
    """Address up to `/chat/completions`, such as http://127.0.0.1:30000/v1."""
    model: str
    """Name of the model at the server."""
    api_key_env: str | None = None
    """Variable with the key, in the environment of the run's start or in system_envs; default: no key is sent."""
    prompt: str = "match"
    """Question to the judge: `match` (YES or NO: the response has the ground truth), `rating` (0 to 10), or a text with
    {response} and any of {prompt} and {ground_truth}. ROLL's names {question}, {reference} and
    Qwen2.5-7B-Instruct-RLVR-prompt (as `match`) are known too."""
    score: str = "yes_no"
    r"""Reading of the verdict, after its last `</think>`. yes_no: the last of these words, 1 or 0. boxed: the number in
    the last `\boxed{}`. Else a regular expression; the first group of its last match is the number."""
    max_tokens: PositiveInt = 512
    """Longest verdict, in tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature."""
    extra_body: dict[str, Any] = {}
    """Further fields of the request, such as chat_template_kwargs. No key: it would be saved."""
    max_concurrency: PositiveInt = 32
    """Largest number of open requests, over all samples."""
    retries: NonNegativeInt = 5
    """Repetitions of a request after 408, 409, 429, 5xx, a timeout, a lost connection or an unreadable answer. The
    pause doubles from 0.5 to 30 seconds; Retry-After replaces it."""
    timeout: Seconds = 120.0
    """Seconds for one request."""


class RewardConfig(Config):
    """One reward rule."""

    reward: str
    """Built-in rule (docs/rewards.md) or `package.module:function`. A function takes by name any of `response`,
    `ground_truth`, `domain`, `prompt`, `messages`, `row`, `finish_reason` and `num_response_tokens`."""
    tag_included: tuple[str, ...] = ()
    """Domains scored by this rule; empty: every domain not named by another rule. A domain may have several rules."""
    weight: FiniteFloat = 1.0
    """Factor of the rule's score. A sample's score is the sum over the rules of its domain."""
    kwargs: dict[str, str | int | float | bool] = {}
    """Further arguments of the rule, under other names. Not for secrets, since the configuration is printed and saved:
    read those from `os.environ` (the run's, without Ray's variables)."""
    timeout: Seconds | None = None
    """Seconds per response; default: 30, 2 for `math`, 120 for `code`. Past it a function is killed, without a reward;
    its first call in a process may take longer, for imports. `math` and `code` give 0; `math` counts processor time, so
    a busy machine changes no score. Not for `llm_judge`: see judge.timeout."""
    skip_special_tokens: bool = True
    """Remove special tokens, such as the end token, from the response's text; false: the rule sees them."""
    judge: JudgeConfig | None = None
    """The judge of `llm_judge`."""
    filter_groups: GroupFilter | None = None
    """Filter of groups whose prompts belong to this section; default: the root's `filter_groups`."""

    @property
    def time_limit(self) -> float:
        """Seconds allowed for one response."""
        return self.timeout or _SECONDS.get(self.reward, 30.0)
