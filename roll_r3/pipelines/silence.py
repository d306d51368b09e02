"""Warnings about steps without a learning signal: no reward, advantage or gradient for several steps in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from roll_r3.config.derived import sampled_tokens
from roll_r3.config.pipeline import RLVRConfig

FIRST_WARNING = 3
"""Silent steps in a row before the first warning; the next ones come after twice as many each."""
_MANY_CUT = 0.5
_WITHOUT_GRADIENT = ("ppo", "dppo_tv")
"""Losses without a gradient at the tokens they cut. The others truncate a weight."""


class SilenceWatch:
    """Counts silent steps of a run and says so, with the likely reasons."""

    def __init__(self, config: RLVRConfig) -> None:
        self._config = config
        self._silent = {"reward": 0, "advantage": 0, "gradient": 0}
        """Steps in a row."""

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Take the metrics of the next step with samples; return a warning if one is due."""
        quiet = {
            "reward": metrics["critic/score/max"] == metrics["critic/score/min"] == 0,
            # a step without a token left to train has no advantages
            "advantage": metrics.get("critic/advantages/max", 0) == metrics.get("critic/advantages/min", 0) == 0,
            "gradient": metrics.get("actor_train/grad_norm", 0.0) == 0,
        }
        self._silent = {name: self._silent[name] + 1 if quiet[name] else 0 for name in quiet}
        if not any(_is_due(count) for count in self._silent.values()):
            return None
        return "\n  ".join([self._headline(), *self._reasons(metrics)])

    def _headline(self) -> str:
        """Return the quantities silent for at least as long as a first warning takes."""
        words = {"reward": "every reward is 0", "advantage": "every advantage is 0", "gradient": "the gradient is 0"}
        long = [f"{words[name]} (for {count} steps)" for name, count in self._silent.items() if count >= FIRST_WARNING]
        terms = [
            name
            for name, on in (("KL", self._config.use_kl_loss), ("entropy", self._config.entropy_loss_coef > 0))
            if on
        ]
        only = (
            f"; only the {' and '.join(terms)} term moves the weights" if terms and not self._silent["gradient"] else ""
        )
        return f"NOTHING IS LEARNED: {', '.join(long)}{only}. Likely reasons:"

    def _reasons(self, metrics: Mapping[str, float]) -> Iterator[str]:
        silent = self._silent
        cut = metrics["tokens/truncated_ratio"]
        if cut > _MANY_CUT:
            given = self._config.actor_infer.generating_args.max_new_tokens
            limit = "response_length" if given is None else "max_new_tokens"
            yield (
                f"- {cut:.0%} of the responses reach {limit} ({sampled_tokens(self._config)} tokens) and are cut "
                "before their answer: raise it, or ask for shorter answers in the prompt"
            )
        if (rejected := metrics.get("rollout_corr/rejected_tokens", 0.0)) > _MANY_CUT:
            yield (
                f"- the filters of rollout_correction reject {rejected:.0%} of the tokens: widen their bounds, or look "
                "for the difference between rollout and trainer in rollout_corr/ of the metrics"
            )
        if (kept := metrics.get("actor/final_mask_ratio", 1.0)) < 1 - _MANY_CUT:
            yield (
                f"- max_len_mask and difficulty_mask leave out {1 - kept:.0%} of the samples: compare actor/ of the "
                "metrics, allow longer responses, or choose other prompts"
            )
        if silent["reward"]:
            yield (
                "- the reward rule finds no right answer: compare response and ground_truth in samples.jsonl; the rule "
                "may want another form, or data_args.ground_truth may name another column"
            )
        elif silent["advantage"] and metrics["critic/score/min"] > 0:
            yield "- every answer is right: the prompts are too easy for this policy"
        if silent["advantage"] and "critic/advantages/max" in metrics:
            yield (
                f"- all responses of a prompt have the same reward in {metrics['reward/groups_without_signal']:.0%} of "
                f"the groups ({metrics['reward/groups_all_right']:.0%} all right, "
                f"{metrics['reward/groups_all_wrong']:.0%} all wrong): choose prompts that are neither too hard nor "
                "too easy, or raise num_return_sequences_in_group"
            )
        elif silent["gradient"] and metrics.get("actor_train/optimizer_steps") == 0:
            yield "- every optimizer step was skipped, because its loss or gradient was not finite: see logs/driver.log"
        elif silent["gradient"] and "actor/pg_clipfrac" in metrics and self._config.pg_variant in _WITHOUT_GRADIENT:
            yield (
                f"- {metrics['actor/pg_clipfrac']:.0%} of the tokens have no gradient, since the loss clips "
                "their ratio: lower the learning rate or the number of optimizer steps in a step"
            )


def _is_due(count: int) -> bool:
    """True after FIRST_WARNING steps, and after 2, 4, 8 ... times as many."""
    times, rest = divmod(count, FIRST_WARNING)
    return times > 0 and rest == 0 and times & (times - 1) == 0
