"""Evaluation between steps: prompts of their own, sampled from the current weights, scored, and never trained on."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from roll_r3.cluster.engine_pool import EnginePool
from roll_r3.config.derived import evaluation_sampling
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.data.evaluation_sets import EvaluationSet
from roll_r3.data.prompts import Prompt
from roll_r3.pipelines.evaluation_metrics import EvaluatedSample, set_metrics
from roll_r3.pipelines.experience import Decoder, response_of
from roll_r3.pipelines.step_metrics import StepClock
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Answer, Rewards
from roll_r3.strategies.base import GenerateRequest
from roll_r3.tracking.progress import Progress

logger = logging.getLogger(__name__)

_REASONS = 3
"""Number of reasons for missing samples or scores in a line."""
_CACHE_KEY = "evaluation"
"""Key of prefixes in the engines' caches, apart from training's."""


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation."""

    step: int
    """Number of steps behind the evaluated weights."""
    metrics: dict[str, float]
    samples: list[EvaluatedSample]


def evaluation_due(config: RLVRConfig, step: int) -> bool:
    """Return True if the weights after `step` steps are evaluated; 0: before the first step."""
    if config.validation is None:
        return False
    if step == 0:
        return config.validation.eval_at_start
    return step == config.max_steps or (config.eval_steps > 0 and step % config.eval_steps == 0)


@dataclass(frozen=True)
class _Answered:
    """Responses to a prompt, without their tokens: a large evaluation has hundreds of millions."""

    sample_ids: tuple[str, ...]
    responses: Sequence[Response]
    answers: Future[list[Answer]]
    dropped: Mapping[str, str]
    """Sample id -> reason."""


class Evaluator:
    """Evaluates the engines' weights. Training's seeds, ids and order do not depend on it."""

    def __init__(
        self,
        config: RLVRConfig,
        sets: Sequence[EvaluationSet],
        *,
        pool: EnginePool,
        rewards: Rewards,
        decoder: Decoder,
        progress: Progress,
    ) -> None:
        self._config, self._sets = config, sets
        self._pool, self._rewards, self._decoder = pool, rewards, decoder
        self._progress = progress

    def run(self, step: int) -> Evaluation:
        """Evaluate every set. A response without a score is counted and left out; it never ends the run.

        Args:
            step: number of steps behind the weights.

        Raises:
            EngineError: an engine went down more often than the configuration allows in a step.
            WorkerError: a worker failed or died.
        """
        clock = StepClock()
        with self._progress.stage("evaluation", step), clock.stage("evaluation"):
            asked = [(one, prompt, request) for one in self._sets for prompt, request in self._requests(one, step)]
            found = self._answers([(prompt, request) for _, prompt, request in asked])
            groups = [
                self._evaluated(one.name, prompt, request, answered)
                for (one, prompt, request), answered in zip(asked, found, strict=True)
            ]
        metrics = clock.seconds | self._metrics([(one.name, prompt) for one, prompt, _ in asked], groups)
        self._report(step, metrics, found)
        return Evaluation(step, metrics, [sample for group in groups for sample in group])

    def _requests(self, one: EvaluationSet, step: int) -> Iterator[tuple[Prompt, GenerateRequest]]:
        """Yield a request for each prompt of a set. Seeds follow from the run's seed, the set and the place in it."""
        settings = self._config.validation
        assert settings is not None, "there are sets"
        sampling, samples = evaluation_sampling(self._config), settings.val_n_sample
        name = int.from_bytes(hashlib.sha256(one.name.encode()).digest()[:8])
        seeds = np.random.default_rng((self._config.seed, name)).integers(1 << 31, size=(len(one.prompts), samples))
        for i, prompt in enumerate(one.prompts):
            group = f"evaluation{step}/{one.name}/prompt{i}"
            yield (
                prompt,
                GenerateRequest(
                    prompt_ids=prompt.token_ids,
                    sample_ids=tuple(f"{group}/sample{j}" for j in range(samples)),
                    seeds=tuple(int(seed) for seed in seeds[i]),
                    group_id=group,
                    sampling=sampling,
                    record_routes=False,
                    cache_key=_CACHE_KEY,
                ),
            )

    def _answers(self, asked: Sequence[tuple[Prompt, GenerateRequest]]) -> list[_Answered]:
        """Sample everything, and score groups while others are still sampled; results in the order of `asked`."""
        assert not self._pool.in_flight, "results of other requests would be taken for these"
        tickets = self._pool.submit([request for _, request in asked])
        prompts = {ticket.number: prompt for ticket, (prompt, _) in zip(tickets, asked, strict=True)}
        found: dict[int, _Answered] = {}
        while len(found) < len(tickets):
            for done in self._pool.completed():
                number, result = done.ticket.number, done.result
                responses = [response_of(prompts[number], t, self._rewards, self._decoder) for t in result.trajectories]
                sample_ids = tuple(t.sample_id for t in result.trajectories)
                found[number] = _Answered(sample_ids, responses, self._rewards.begin(responses), result.dropped)
        for answered in found.values():
            answered.answers.result()
        return [found[ticket.number] for ticket in tickets]

    def _evaluated(
        self, name: str, prompt: Prompt, request: GenerateRequest, answered: _Answered
    ) -> list[EvaluatedSample]:
        """Return the responses to one prompt."""
        return [
            EvaluatedSample(
                set=name,
                prompt_id=prompt.prompt_id,
                sample=request.sample_ids.index(sample_id),
                domain=self._rewards.section_of(prompt.domain),
                prompt=prompt.text,
                response=response.response,
                ground_truth=prompt.ground_truth,
                score=answer.score,
                finish_reason=response.finish_reason,
                response_length=response.num_response_tokens,
            )
            for sample_id, response, answer in zip(
                answered.sample_ids, answered.responses, answered.answers.result(), strict=True
            )
        ]

    def _metrics(
        self, places: Sequence[tuple[str, Prompt]], groups: Sequence[Sequence[EvaluatedSample]]
    ) -> dict[str, float]:
        """Return the metrics of every set, and of each domain of a set with several."""
        assert self._config.validation is not None, "there are sets"
        samples = self._config.validation.val_n_sample
        by_prefix: dict[str, list[Sequence[EvaluatedSample]]] = {}
        domains = {(name, self._rewards.section_of(prompt.domain)) for name, prompt in places}
        several = {name for name, count in Counter(name for name, _ in domains).items() if count > 1}
        for (name, prompt), group in zip(places, groups, strict=True):
            by_prefix.setdefault(f"val/{name}", []).append(group)
            if name in several:
                by_prefix.setdefault(f"val/{name}/{self._rewards.section_of(prompt.domain)}", []).append(group)
        metrics: dict[str, float] = {}
        for prefix, found in by_prefix.items():
            dropped = samples * len(found) - sum(map(len, found))
            metrics |= set_metrics(prefix, found, samples_per_prompt=samples, dropped=dropped)
        return metrics

    def _report(self, step: int, metrics: Mapping[str, float], found: Sequence[_Answered]) -> None:
        """Print the scores, and the reasons for missing ones."""
        for line in evaluation_lines(metrics, [one.name for one in self._sets]):
            self._progress.say(f"evaluation after step {step}: {line}" if step else f"evaluation at the start: {line}")
        dropped = Counter(why for answered in found for why in answered.dropped.values())
        failed = Counter(
            answer.why for answered in found for answer in answered.answers.result() if answer.score is None
        )
        for text, reasons in (("samples not returned by the engines", dropped), ("responses without a score", failed)):
            if reasons:
                shown = "; ".join(why for why, _ in reasons.most_common(_REASONS))
                message = f"evaluation after step {step}: left out {reasons.total()} {text}: {shown}"
                logger.warning("%s", message)
                self._progress.say(message)


def evaluation_lines(metrics: Mapping[str, float], names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each set: its scores, the share of cut responses and their mean length."""
    for name in names:
        prefix = f"val/{name}/"
        own = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        scores = [f"{key} {value:.4f}" for key, value in own.items() if "@" in key and "/" not in key]
        if scores:
            scores.append(f"cut {own['truncated_ratio']:.1%}")
            scores.append(f"mean length {own['response_length/mean']:.1f}")
        yield f"{name}: {', '.join(scores) or 'no response has a score'} ({own['prompts']:.0f} prompts)"
