"""Kill a run with `kill -9` at random moments, start it again each time, and compare it with one that nobody touched.

    .venv/bin/python -m examples.reliability.kill_at_random [--kills 20] [--seed 0] [--output DIR]

The run is the real program: Ray, Megatron on two ranks, the rollout by transformers, which on a CPU samples to the bit
what it sampled before. One moment in five lies in the start, from the first import to the first weights; the others lie
in the steps that follow, saving included. A run that ends before its moment comes is compared as it is, and another one
begins. A row is equal if the metrics that the next start finds, and after the last kill those of the whole run, are
those of the run that nobody touched, bit by bit, without what a clock says.

Exit status: 0 all rows are equal, 1 some are not.
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
"""The share of moments that lie there."""
STEPS_A_LIFE = 4
"""A moment in the steps lies in as many of them as this, at most; so the run gets further and may be saved or not."""
TIMED = ("time/", "system/tps", "router_replay/time_share")
TIMEOUT = 900.0
Metrics = list[dict[str, float]]


class Life:
    """One process of a run, from its start to its end."""

    def __init__(self, where: Path, checkpoint: Path) -> None:
        """
        Args:
            where: of the run; a life that finds a checkpoint there goes on from it.
        """
        self.where = where
        where.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        command = [sys.executable, "-m", "roll_r3.run", "--config", str(ROOT / "configs" / "quickstart_engines.yaml")]
        command += [f"pretrain={checkpoint}", f"output_dir={where}", *OVERRIDES]
        with (where / "stderr").open("w") as err:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)

    @property
    def said(self) -> str:
        return (self.where / "stderr").read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, *, said: str | None = None, seconds: float = TIMEOUT) -> None:
        """Until the process says something, has ended, or so many seconds have gone by."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline and not (said and said in self.said):
            time.sleep(0.005)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        """Raises RuntimeError: it failed, or does not end."""
        self.wait()
        if self._process.poll() != 0:
            self.kill()
            raise RuntimeError(f"the run in {self.where} did not end well:\n{self.said}")

    def resumed(self) -> int | None:
        """The step that it went on after, 0 for a new run; None: it was killed before it knew."""
        if "starting from" in self.said:
            return 0
        found = re.search(r"(?:going on after|nothing to do: .* is of) step (\d+)", self.said)
        return int(found[1]) if found else None

    def stage(self) -> str:
        """The last that it began, as the driver's log has it."""
        logs = sorted(self.where.glob("*/latest/logs/driver.log"))
        stages = re.findall(r" step \d+: .*|tracking\.progress: .*", logs[-1].read_text()) if logs else []
        begun = [stage.rpartition("progress: ")[2].strip() for stage in stages]
        return begun[-1] if begun and "run directory" in self.said else "importing"


def metrics(where: Path) -> Metrics:
    """Of the steps that are done, without what a clock says; a line that is cut off is of a step that is not done."""
    rows = []
    for file in where.glob("*/latest/metrics.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append({k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)})
    return rows


@dataclass
class Kill:
    """A row of the table."""

    moment: float
    """Seconds after the process was started."""
    stage: str
    done: int
    """Steps."""
    resumed: int = 0
    """The step that a later start went on after: the next, or one after it where the next was killed too early."""
    equal: bool = False

    def __str__(self) -> str:
        equal = "yes" if self.equal else "NO"
        return f"{self.moment:8.1f}  {self.stage:<50} {self.done:>5} {self.resumed:>8} {equal:>6}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="kill_at_random", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("output/reliability"), help="a directory that is not there")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output: {options.output} is there already: name another directory, or remove it")
    checkpoint = make_tiny_checkpoint(
        (options.output / "tiny").absolute(), examples=addition_mod10(), warm_start_steps=60
    )
    whole = Life(options.output.absolute() / "whole", checkpoint)
    whole.wait(said="sending the first weights")
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
    """So many kills, each printed when it is known how it went on."""
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
            life.wait(said="sending the first weights")
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
