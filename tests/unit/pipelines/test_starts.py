"""The steps of a start, without a cluster."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.pipelines.leaving import Leaving
from roll_r3.pipelines.rlvr import StepResult
from roll_r3.pipelines.starts import Starts
from roll_r3.tracking.run_dir import RunDir


class Experience:
    """What a step learns from, which holds handles of routes."""


class Pipeline:
    """Knows how much of the steps before is still there when a step is sampled."""

    samples_seen = 0

    def __init__(self) -> None:
        self.kept: list[int] = []
        self._made: list[weakref.ref[Experience]] = []

    def sample(self, step: int) -> Experience:
        self.kept.append(sum(made() is not None for made in self._made))
        experience = Experience()
        self._made.append(weakref.ref(experience))
        return experience

    def learn(self, experience: Experience) -> StepResult:
        return StepResult({}, [])


def test_a_steps_routes_are_let_go_before_the_next_is_sampled(tmp_path: Path) -> None:
    config = RLVRConfig(exp_name="exp", pretrain="p", max_steps=3, actor_train={}, actor_infer={})
    anything, pipeline = MagicMock(), Pipeline()
    starts = Starts(
        config,
        run_dir=RunDir(tmp_path, tmp_path),
        tokenizer=None,
        prompts=[],
        rewards=anything,
        progress=anything,
        leaving=Leaving(60.0),
    )
    checkpoints: Any = MagicMock()
    checkpoints.seconds_waited.return_value = 1.5
    log: Any = MagicMock()
    starts._steps(pipeline, 0, log, checkpoints)
    assert pipeline.kept == [0, 0, 0]
    assert [call.args for call in log.write.call_args_list] == [(step, {"time/step_save": 1.5}) for step in (1, 2, 3)]
    assert [call.args for call in checkpoints.step_done.call_args_list] == [(step, 0) for step in (1, 2, 3)]
