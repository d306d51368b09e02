"""Kill a run with `kill -9` at random moments, restart it each time, and compare it with an undisturbed run.

    .venv/bin/python -m examples.reliability.kill_at_random [--kills 20] [--seed 0] [--output DIR]

The run is the real program: Ray, Megatron on two ranks, and the rollout by transformers, whose samples on a CPU are
reproducible bit by bit. One moment in five lies in the start, from the first import to the first weights; the others
lie in the steps, saving included. A run that ends before its moment is compared, and another one begins. A row is equal
if the metrics found by the next start equal those of the undisturbed run, bit by bit, except for times. After the last
kill the metrics of the whole run are compared.

Exit status: 0 all rows are equal, 1 some differ.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 24, 2
OVERRIDES = (
    f"max_steps={STEPS}",
    f"save_steps={SAVE_STEPS}",
    "rollout_batch_size=8",
    "num_return_sequences_in_group=8",
    "actor_infer.strategy_args.strategy_name=hf_infer",
    "actor_infer.strategy_args.strategy_config.dtype=float32",
    "actor_train.training_args.lr_scheduler_type=cosine",
    "resume_from_checkpoint=auto",
)
IN_THE_START = 0.2
"""Share of moments in the start."""
STEPS_A_LIFE = 4
"""Maximum number of steps before a moment, so that the run progresses, with or without a save."""
TIMED = ("time/", "system/tps", "router_replay/time_share")
TIMEOUT = 900.0
Metrics = list[dict[str, float]]


class Life:
    """Process of a run, from start to end."""

    def __init__(self, where: Path, checkpoint: Path) -> None:
        """
        Args:
            where: directory of the run; the process resumes from a checkpoint in it.
        """
        self.where = where
        where.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        command = [sys.executable, "-m", "roll_r3.run", "--config", str(ROOT / "configs" / "quickstart_engines.yaml")]
        command += [f"pretrain={checkpoint}", f"output_dir={where}", *OVERRIDES]
        with (where / "stderr").open("w") as err:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)

    @property
    def messages(self) -> str:
        return (self.where / "stderr").read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, *, text: str | None = None, seconds: float = TIMEOUT) -> None:
        """Wait for a text of the process, for its end, or for a number of seconds."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline and not (text and text in self.messages):
            time.sleep(0.005)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        """Wait for the end. Raises RuntimeError if the process fails or does not end."""
        self.wait()
        if self._process.poll() != 0:
            self.kill()
            raise RuntimeError(f"the run in {self.where} did not end well:\n{self.messages}")

    def resumed(self) -> int | None:
        """Step from which it resumed, 0 for a new run; None: killed before resuming."""
        if "starting from" in self.messages:
            return 0
        found = re.search(r"(?:resuming after|nothing to do: .* is of) step (\d+)", self.messages)
        return int(found[1]) if found else None

    def stage(self) -> str:
        """Last stage begun, from the driver's log."""
        logs = sorted(self.where.glob("*/latest/logs/driver.log"))
        stages = re.findall(r" step \d+: .*|tracking\.progress: .*", logs[-1].read_text()) if logs else []
        begun = [stage.rpartition("progress: ")[2].strip() for stage in stages]
        return begun[-1] if begun and "run directory" in self.messages else "importing"


def metrics(where: Path) -> Metrics:
    """Read the metrics of finished steps, without times. A truncated line belongs to an unfinished step."""
    rows = []
    for file in where.glob("*/latest/metrics.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append({k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)})
    return rows


@dataclass
class Kill:
    """Row of the table."""

    moment: float
    """Seconds since the start of the process."""
    stage: str
    done: int
    """Number of steps."""
    resumed: int = 0
    """Step from which a later start resumed: the next start, or one after it if the next was killed too early."""
    equal: bool = False

    def __str__(self) -> str:
        equal = "yes" if self.equal else "NO"
        return f"{self.moment:8.1f}  {self.stage:<50} {self.done:>5} {self.resumed:>8} {equal:>6}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="kill_at_random", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("output/reliability"), help="directory to create")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output: {options.output} exists already: name another directory, or remove it")
    checkpoint = make_tiny_checkpoint(
        (options.output / "tiny").absolute(), examples=addition_mod10(), warm_start_steps=60
    )
    whole = Life(options.output.absolute() / "whole", checkpoint)
    whole.wait(text="sending the first weights")
    start = time.monotonic() - whole.started
    whole.finish()
    wanted = metrics(whole.where)
    step = (time.monotonic() - whole.started - start) / STEPS
    print(f"seed {options.seed}; {len(wanted)} steps in {start:.0f} s of start and {step:.1f} s a step")
    print(f"{'second':>8}  {'killed in':<50} {'steps':>5} {'resumed':>8} {'equal':>6}", flush=True)
    kills = _kill(
        options.kills, random.Random(options.seed), options.output.absolute(), checkpoint, wanted, start, step
    )
    equal = sum(kill.equal for kill in kills)
    print(f"{equal} of {len(kills)} equal")
    return 0 if equal == len(kills) else 1


def _kill(
    count: int, draw: random.Random, output: Path, checkpoint: Path, wanted: Metrics, start: float, step: float
) -> list[Kill]:
    """Kill the run a number of times, and print each kill once its outcome is known."""
    kills: list[Kill] = []
    open_rows: list[Kill] = []  # of those it is not known yet how the run went on
    run = 0
    life = Life(output / f"run-{run}", checkpoint)
    while len(kills) < count or open_rows:
        if len(kills) == count:
            life.wait()
        elif draw.random() < IN_THE_START:
            life.wait(seconds=draw.uniform(0, start))
        else:
            life.wait(text="sending the first weights")
            life.wait(seconds=draw.uniform(0, STEPS_A_LIFE * step))
        over = life.ended
        if over:
            life.finish()
        else:
            life.kill()
        found, resumed = metrics(life.where), life.resumed()
        if resumed is not None:
            for row in open_rows:
                row.resumed, row.equal = resumed, found == (wanted if over else wanted[: len(found)])
                print(row, flush=True)
            open_rows = []
        if over:
            run += 1
        else:
            kills.append(Kill(time.monotonic() - life.started, life.stage(), len(found)))
            open_rows.append(kills[-1])
        life = Life(output / f"run-{run}", checkpoint) if len(kills) < count or open_rows else life
    return kills


if __name__ == "__main__":
    sys.exit(main())
