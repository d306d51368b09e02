"""Whole run as started by a user: the program in its own process, and its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from leftovers import TOKEN, Descendants

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 500
RAYS_LAST_WORD = 90.0
"""Seconds until the last of Ray's processes is gone after the driver was killed.

Two of them try to report Ray's end to the driver and give up after a minute. Sufficient on a busy machine.
"""


class Run:
    """A run in its own process."""

    def __init__(self, tmp_path: Path, checkpoint: Path, *overrides: str, config: str = "quickstart") -> None:
        """Start the run.

        Args:
            tmp_path: directory for its output.
            config: file under configs/.
        """
        tmp_path.mkdir(parents=True, exist_ok=True)
        self.output = tmp_path / "output"
        self.stdout, self.stderr = tmp_path / "stdout", tmp_path / "stderr"
        command = [sys.executable, "-m", "roll_r3.run", "--config", str(ROOT / "configs" / f"{config}.yaml")]
        command += [f"pretrain={checkpoint}", f"output_dir={self.output}", *overrides]
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.started = Descendants()
            """All processes of the run, including orphans."""
            env = os.environ | {TOKEN: self.started.token}
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)

    @property
    def path(self) -> Path:
        return next(self.output.glob("*/latest"))

    def metrics(self) -> list[dict[str, float]]:
        files = self.output.glob("*/latest/metrics.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while len(self.metrics()) < step:
            assert self.process.poll() is None, self.stderr.read_text()
            assert time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.2)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self, timeout: float) -> int:
        """Wait for the run's own end, check for leftovers, and return its exit status."""
        status = self.process.wait(timeout)
        left = self.started.left()
        assert left == [], "left behind:\n" + "\n".join(left)
        return status

    def end(self) -> None:
        self.started.kill()
        self.started.close()
        self.process.wait()


def few_steps(steps: int, *more: str) -> tuple[str, ...]:
    return (f"max_steps={steps}", "rollout_batch_size=16", "num_return_sequences_in_group=8", *more)


SAMPLED_TO_THE_BIT = (
    "rollout_batch_size=8",
    "actor_infer.strategy_args.strategy_name=hf_infer",
    "actor_infer.strategy_args.strategy_config.dtype=float32",
    "force_on_policy_ratio=false",
)
"""Overrides for a CPU rollout with samples repeatable to the bit.

A step is one optimizer step with all stages, including the pass for old log-probabilities.
"""


def finished(run: Run) -> Run:
    """Return the run after it has ended by itself, with status 0."""
    try:
        assert run.finish(2 * START_TIMEOUT) == 0, run.stderr.read_text()
    finally:
        run.end()
    return run


def learned(run: Run) -> list[dict[str, float]]:
    """Return the metrics of all steps, without times."""
    timed = ("time/", "system/tps", "router_replay/time_share")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in run.metrics()]
