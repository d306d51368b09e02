"""A whole run as a user starts it: the program in a process of its own, and what it writes."""

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
"""Seconds until the last of Ray's processes is gone after a driver that was killed: two of them try to tell it that Ray
has ended, and give up after a minute. On a busy machine too."""


class Run:
    """A run in a process of its own."""

    def __init__(self, tmp_path: Path, checkpoint: Path, *overrides: str, config: str = "quickstart") -> None:
        """
        Args:
            tmp_path: where its output goes.
            config: file under configs/.
        """
        tmp_path.mkdir(parents=True, exist_ok=True)
        self.output = tmp_path / "output"
        self.stdout, self.stderr = tmp_path / "stdout", tmp_path / "stderr"
        command = [sys.executable, "-m", "roll_r3.run", "--config", str(ROOT / "configs" / f"{config}.yaml")]
        command += [f"pretrain={checkpoint}", f"output_dir={self.output}", *overrides]
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.started = Descendants()
            """Every process of it, also those that have lost their parent."""
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
        """The exit status of a run that ends by itself; then nothing of it is there any more."""
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
"""A rollout that samples again, on a CPU, to the bit what it sampled before. A step is one optimizer step, and still
has every stage, the pass for old log-probabilities too."""


def finished(run: Run) -> Run:
    """The run once it has ended by itself, and well."""
    try:
        assert run.finish(2 * START_TIMEOUT) == 0, run.stderr.read_text()
    finally:
        run.end()
    return run


def learned(run: Run) -> list[dict[str, float]]:
    """What the steps measured, but for how long they took."""
    timed = ("time/", "system/tps", "router_replay/time_share")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in run.metrics()]
