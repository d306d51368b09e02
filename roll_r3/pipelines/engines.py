"""The engines as a step needs them: they sample and take weights, whatever becomes of one of them in between.

An engine that is down is started again by its worker, gets the trainer's weights back and the samples that it lost are
asked for again, under the same ids and seeds. Every sample of a step is of the step's weights: an engine started again
refuses to sample before it has them, and answers of any other version are refused by the engine's own strategy.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from roll_r3.cluster.groups import ModelGroup, RolloutGroup
from roll_r3.config.derived import server
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import EngineError
from roll_r3.strategies.base import GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)

LIMIT = "actor_infer.strategy_args.strategy_config.max_restarts"


class Engines:
    """`actor_infer`, with the weights of `actor_train`."""

    def __init__(
        self, config: RLVRConfig, rollout: RolloutGroup, trainer: ModelGroup, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            say: shows a line to the person who started the run.
        """
        settings = server(config)
        self._max_restarts = settings.max_restarts if settings is not None else 0
        self._rollout = rollout
        self._trainer = trainer
        self._say = say
        self._connected = False
        self._version = 0
        self._failures: Counter[str] = Counter()
        self._restarts = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """Sample with all engines, and again what those lost that went down. Results in the order of `requests`.

        Raises:
            EngineError: an engine went down more often than the configuration allows in a step.
            WorkerError: a worker failed or died.
        """
        results = self._rollout.generate(requests)
        while missing := {i: still_lost(requests[i], result) for i, result in enumerate(results) if result.lost}:
            self.send_weights(self._version)
            self._say(f"samples asked for again: {sum(len(request.sample_ids) for request in missing.values())}")
            again = self._rollout.generate(list(missing.values()))
            for i, result in zip(missing, again, strict=True):
                results[i] = completed(requests[i], results[i], result)
        return results

    def send_weights(self, version: int) -> None:
        """Have every engine sample from the trainer's weights, which are of this version, from now on.

        An engine that is down is started again first. If one goes down meanwhile, all are: the others hold part of
        these weights and part of those before, for good.

        Raises:
            EngineError: an engine refused the weights, or went down more often than the configuration allows.
            WorkerError: a worker failed or died.
        """
        self._version = version
        self._start_again(self._rollout.down(ask=False))
        while True:
            if not self._connected:
                self._trainer.connect_engines(self._rollout.weight_targets())
                self._connected = True
            failure = self._trainer.update_weights(version)
            if not failure:
                break
            down = self._rollout.down(ask=True)
            if not down:
                raise EngineError(f"the engines did not get weights {version}: {failure}")
            self._start_again(down, also=set(self._rollout.names) - set(down))
        self._rollout.weights_updated(version)

    def step_done(self) -> int:
        """How many engines were started again since the last step."""
        restarts, self._restarts = self._restarts, 0
        self._failures.clear()
        return restarts

    def _start_again(self, down: Mapping[str, str], also: Collection[str] = ()) -> None:
        """Start engines again, and those that do not come up again, until all are up.

        Args:
            down: worker's name -> why.
            also: workers whose engines did not fail.
        """
        while down:
            for name, why in down.items():
                self._failures[name] += 1
                self._blame(name, why)
            self._restarts += len(down) + len(also)
            self._connected = False
            down, also = self._rollout.restart({*down, *also}), ()

    def _blame(self, name: str, why: str) -> None:
        """Say that an engine failed, or end the run if it did so too often."""
        failures = self._failures[name]
        if failures > self._max_restarts:
            raise EngineError(
                f"{name} failed: {why}\nIt failed {failures} times before a step was done, and {LIMIT} is "
                f"{self._max_restarts}"
            )
        logger.warning("%s failed, and is started again (%d of %d): %s", name, failures, self._max_restarts, why)
        self._say(
            f"{name} failed, and is started again ({failures} of {self._max_restarts} times before a step is done): "
            f"{why.splitlines()[0].partition('; the end of ')[0]} (more in logs/driver.log)"
        )


def still_lost(request: GenerateRequest, result: GenerateResult) -> GenerateRequest:
    """A request for the samples that a result lacks because an engine lost them, under their ids and seeds."""
    seeds = dict(zip(request.sample_ids, request.seeds, strict=True))
    return GenerateRequest(request.prompt_ids, result.lost, tuple(seeds[sample_id] for sample_id in result.lost))


def completed(request: GenerateRequest, result: GenerateResult, again: GenerateResult) -> GenerateResult:
    """A result with what came when its lost samples were asked for again, in the order of the request."""
    came = [*result.trajectories, *again.trajectories]
    by_id = {trajectory.sample_id: trajectory for trajectory in came}
    assert len(by_id) == len(came), "a sample that came is not asked for again"
    return GenerateResult(
        trajectories=tuple(by_id[sample_id] for sample_id in request.sample_ids if sample_id in by_id),
        dropped=result.dropped | again.dropped,
        lost=again.lost,
        retries=result.retries + again.retries,
    )
