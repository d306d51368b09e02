"""Evaluation in front of a stand-in for the engines: requests, seeds, metrics, missing responses."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.cluster.engine_pool import Completed, Ticket
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import Sampling
from roll_r3.data.evaluation_sets import EvaluationSet
from roll_r3.data.prompts import Prompt
from roll_r3.pipelines.evaluation import Evaluator, evaluation_due
from roll_r3.pipelines.group_requests import GroupRequests
from roll_r3.rewards.functions import Response
from roll_r3.rewards.scoring import Answer
from roll_r3.strategies.base import GenerateRequest, GenerateResult
from roll_r3.tracking.names import declared_order
from roll_r3.tracking.progress import Progress


class Cluster:
    """Pool, rewards and tokenizer. A response is its seed's last digit; results come in the reverse order."""

    in_flight = 0

    def __init__(self, *, dropped: Sequence[str] = (), failing: Sequence[str] = ()) -> None:
        self.dropped, self.failing = dropped, failing
        self.requests: list[GenerateRequest] = []

    def submit(self, requests: Sequence[GenerateRequest]) -> list[Ticket]:
        self.requests = list(requests)
        self.tickets = [Ticket(10 + i, request) for i, request in enumerate(requests)]
        self.left = self.tickets[::-1]
        return self.tickets

    def completed(self) -> list[Completed]:
        ticket, *self.left = self.left
        request = ticket.request
        seeds = dict(zip(request.sample_ids, request.seeds, strict=True))
        came = [sample_id for sample_id in request.sample_ids if sample_id not in self.dropped]
        trajectories = tuple(
            Trajectory.one_turn(
                sample_id,
                request.group_id,
                prompt_ids=request.prompt_ids,
                response_ids=[seeds[sample_id] % 2],
                log_probs=[-1.0],
                version=0,
                finish_reason="stop",
            )
            for sample_id in came
        )
        dropped = {sample_id: "HTTP 500" for sample_id in request.sample_ids if sample_id in self.dropped}
        return [Completed(ticket, GenerateResult(trajectories, dropped=dropped))]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(token_ids[0])

    def skips_special_tokens(self, domain: str) -> bool:
        return True

    def section_of(self, domain: str) -> str:
        return f"rule of {domain}"

    def begin(self, responses: Sequence[Response]) -> Future[list[Answer]]:
        future: Future[list[Answer]] = Future()
        future.set_result(
            [
                Answer(None, {}, "it raised") if r.prompt in self.failing else Answer(float(r.response), {})
                for r in responses
            ]
        )
        return future


SETS = [
    EvaluationSet("easy", [Prompt(f"e{i}", f"easy {i}", (1, i), "1", domain="math") for i in range(3)]),
    EvaluationSet("mixed", [Prompt(d, f"mixed {d}", (2,), "1", domain=d) for d in ("math", "code")]),
]


def config_of(**validation: Any) -> RLVRConfig:
    validation = {"data_args": {"file_name": "a"}, "val_n_sample": 4} | validation
    fields = {"exp_name": "x", "pretrain": "p", "max_steps": 10, "response_length": 30, "actor_train": {}}
    return RLVRConfig(**fields, actor_infer={"router_replay": {"mode": "R3"}}, validation=validation, eval_steps=4)


def evaluated(cluster: Cluster, said: list[str] | None = None, step: int = 4, **validation: Any) -> Any:
    progress = Progress(1)
    progress.say = ([] if said is None else said).append  # type: ignore[method-assign]
    parts: Any = cluster
    evaluator = Evaluator(config_of(**validation), SETS, pool=parts, rewards=parts, decoder=parts, progress=progress)
    return evaluator.run(step)


def test_it_is_due_at_the_start_every_few_steps_and_at_the_end() -> None:
    assert [step for step in range(11) if evaluation_due(config_of(), step)] == [0, 4, 8, 10]
    assert [step for step in range(11) if evaluation_due(config_of(eval_at_start=False), step)] == [4, 8, 10]
    never = config_of().model_copy(update={"validation": None})
    assert not any(evaluation_due(never, step) for step in range(11))
    ends = config_of().model_copy(update={"eval_steps": 0})
    assert [step for step in range(11) if evaluation_due(ends, step)] == [0, 10]


def test_requests_have_settings_and_seeds_of_their_own() -> None:
    first, later = Cluster(), Cluster()
    generating = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 100}
    evaluated(first, generating_args=generating)
    evaluated(later, generating_args=generating, step=8)
    assert [r.seeds for r in first.requests] == [r.seeds for r in later.requests], "the same in every evaluation"
    seeds = [seed for request in first.requests for seed in request.seeds]
    assert len(set(seeds)) == len(seeds) == 5 * 4
    groups = GroupRequests(config_of(), 4, "")
    training = [groups.next(prompt) for prompt in SETS[0].prompts]
    assert not set(seeds) & {seed for request in training for seed in request.seeds}
    assert {r.sampling for r in first.requests} == {Sampling(100, temperature=0.6, top_p=0.95)}
    assert not any(r.record_routes for r in first.requests), "routes cost and are not used"
    assert {r.cache_key for r in first.requests} == {"evaluation"} != {r.cache_key for r in training}
    ids = [sample_id for r in [*first.requests, *later.requests, *training] for sample_id in r.sample_ids]
    assert len(set(ids)) == len(ids)
    greedy = Cluster()
    evaluated(greedy, val_greedy=True, val_n_sample=1)
    assert {r.sampling for r in greedy.requests} == {Sampling(30, greedy=True)}


def test_every_set_and_each_of_its_domains_has_metrics() -> None:
    cluster, said = Cluster(), list[str]()
    evaluation = evaluated(cluster, said)
    right = {r.group_id: [seed % 2 for seed in r.seeds] for r in cluster.requests}
    groups = list(right.values())
    metrics = evaluation.metrics
    assert metrics["val/easy/avg@4"] == metrics["val/easy/pass@1"] == np.mean(groups[:3])
    assert metrics["val/easy/pass@4"] == np.mean([any(group) for group in groups[:3]])
    assert metrics["val/mixed/avg@4"] == np.mean(groups[3:])
    assert metrics["val/mixed/rule of math/avg@4"] == np.mean(groups[3])
    assert metrics["val/mixed/rule of code/avg@4"] == np.mean(groups[4])
    assert "val/easy/rule of math/avg@4" not in metrics, "it is the whole set"
    assert metrics["val/easy/prompts"] == 3
    assert metrics["time/step_evaluation"] > 0
    assert declared_order(metrics)[1] == []
    assert [(s.set, s.prompt_id, s.sample) for s in evaluation.samples][:5] == [
        ("easy", "e0", 0),
        ("easy", "e0", 1),
        ("easy", "e0", 2),
        ("easy", "e0", 3),
        ("easy", "e1", 0),
    ]
    assert [float(s.response) for s in evaluation.samples] == [s.score for s in evaluation.samples]
    assert said[0].startswith("evaluation after step 4: easy: avg@4 ")
    assert said[0].endswith("cut 0.0%, mean length 1.0 (3 prompts)")


def test_missing_responses_are_counted_and_do_not_end_the_run() -> None:
    cluster, said = Cluster(dropped=["evaluation4/easy/prompt0/sample1"], failing=["mixed code"]), list[str]()
    metrics = evaluated(cluster, said).metrics
    assert (metrics["val/easy/failed"], metrics["val/mixed/failed"]) == (1, 4)
    assert metrics["val/mixed/rule of code/failed"] == 4
    assert "val/mixed/rule of code/avg@4" not in metrics
    kept = [seed % 2 for r in cluster.requests[:3] for i, seed in enumerate(r.seeds) if r.group_id[-1] != "0" or i != 1]
    assert metrics["val/easy/avg@4"] == pytest.approx(np.mean(kept))
    assert said[-2:] == [
        "evaluation after step 4: left out 1 samples not returned by the engines: HTTP 500",
        "evaluation after step 4: left out 4 responses without a score: it raised",
    ]


def test_a_set_without_any_score_is_reported() -> None:
    said: list[str] = []
    evaluated(Cluster(failing=["mixed code", "mixed math"]), said)
    assert "evaluation after step 4: mixed: no response has a score (2 prompts)" in said
