"""Growth over many steps of a run: memory, objects, references and open files of its processes.

    .venv/bin/python -m examples.benchmarks.memory_over_steps                    # 200 steps, minutes
    .venv/bin/python -m examples.benchmarks.memory_over_steps --steps 40 --from-step 20
    .venv/bin/python -m examples.benchmarks.memory_over_steps actor_infer.strategy_args.strategy_name=sglang

The real program trains a tiny model with R3, saves every fifth step and keeps two checkpoints. After every step a
thread reads for each process its own memory (USS, without memory shared by several such as the object store), its open
files, and the references to objects that Ray reports for it; and the object store. A figure "at step N" is the median
over the `WINDOW` steps up to N.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from examples.benchmarks.measuring import Report, rounded
from roll_r3.models.tiny import make_tiny_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_engines.yaml"
OVERRIDES = (
    "rollout_batch_size=4",
    "num_return_sequences_in_group=4",
    "actor_train.training_args.per_device_train_batch_size=8",
    "actor_infer.strategy_args.strategy_name=hf_infer",
    "save_steps=5",
    "max_ckpt_to_keep=2",
    "checkpoint_config.async_save=true",
)
STEPS, FROM_STEP = 200, 20
WINDOW = 10
"""Number of steps per median."""
_LOOK_EVERY = 0.05
"""Interval in seconds."""
_NAMED = re.compile(r"(?:engine|rank) \d+ is process (\d+)")
"""Beginning of a worker's log."""
_RAYS_OWN = ("gcs_server", "raylet")


@dataclass
class Held:
    """Readings of a process after each step of its life."""

    megabytes: dict[int, float] = field(default_factory=dict)
    files: dict[int, float] = field(default_factory=dict)
    references: dict[int, float] = field(default_factory=dict)
    """References to objects of Ray, if Ray knows the process as one of the run's."""


@dataclass
class Seen:
    """Readings of a whole run."""

    processes: dict[str, Held] = field(default_factory=lambda: defaultdict(Held))
    store_megabytes: dict[int, float] = field(default_factory=dict)
    store_objects: dict[int, float] = field(default_factory=dict)


def run(steps: int, from_step: int, overrides: Sequence[str] = ()) -> Report:
    """Train in a process of its own; return the readings at `steps` over those at `from_step`.

    Raises:
        RuntimeError: the run failed; its message is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_train_and_look, args=(there, steps, tuple(overrides)))
    process.start()
    there.close()
    try:
        seen: Seen = here.recv()
    except EOFError as error:
        raise RuntimeError("the run failed") from error
    finally:
        process.join()
    return {"steps": steps, "from_step": from_step, **growth(seen, from_step, steps)}


def growth(seen: Seen, from_step: int, to_step: int) -> Report:
    """Compare two steps, for every process present at both and for the object store."""

    def at(values: dict[int, float], step: int) -> float | None:
        window = [value for number, value in values.items() if step - WINDOW < number <= step]
        return statistics.median(window) if window else None

    def pair(values: dict[int, float]) -> Report | None:
        before, after = at(values, from_step), at(values, to_step)
        if before is None or after is None:
            return None
        return {
            "before": rounded(before),
            "after": rounded(after),
            "ratio": rounded(after / before) if before else None,
        }

    return {
        "processes": {
            name: {
                what: found
                for what in ("megabytes", "files", "references")
                if (found := pair(getattr(held, what))) is not None
            }
            for name, held in sorted(seen.processes.items())
            if at(held.megabytes, from_step) is not None and at(held.megabytes, to_step) is not None
        },
        "store": {"megabytes": pair(seen.store_megabytes), "objects": pair(seen.store_objects)},
    }


def _train_and_look(answer: Connection, steps: int, overrides: tuple[str, ...]) -> None:
    """Run the program in this process, the driver, with a thread reading its processes."""
    from roll_r3.run import main

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "tiny")
        output = Path(folder) / "output"
        over, seen = threading.Event(), Seen()
        looking = threading.Thread(target=_look_on, args=(output, seen, over))
        looking.start()
        try:
            status = main(
                [
                    *("--config", str(CONFIG), f"pretrain={checkpoint}", f"output_dir={output}"),
                    *(f"max_steps={steps}", *OVERRIDES, *overrides),
                ]
            )
        finally:
            over.set()
            looking.join()
        if status == 0:
            answer.send(seen)
    sys.exit(status)


def _look_on(output: Path, seen: Seen, over: threading.Event) -> None:
    """Read after every finished step, until the run ends."""
    last = 0
    while not over.wait(_LOOK_EVERY):
        step = sum(len(file.read_bytes().splitlines()) for file in output.glob("*/latest/metrics.jsonl"))
        if step > last:
            last = step
            _look(step, output, seen)


def _look(step: int, output: Path, seen: Seen) -> None:
    references = _look_at_store(step, seen)
    for pid, name in _processes(output).items():
        with suppress(psutil.Error):
            process, held = psutil.Process(pid), seen.processes[name]
            held.megabytes[step] = process.memory_full_info().uss / 1e6
            held.files[step] = process.num_fds()
            if pid in references:
                held.references[step] = references[pid]


def _processes(output: Path) -> dict[int, str]:
    """Return process id -> name of this process, the workers, the engines' servers and Ray's processes."""
    driver = psutil.Process()
    names = {driver.pid: "driver"}
    workers = {}
    for log in output.glob("*/latest/logs/*.log"):
        if found := _NAMED.findall(log.read_text(errors="replace")):
            workers[int(found[-1])] = log.stem
    for child in driver.children(recursive=True):
        with suppress(psutil.Error):
            if child.name() in _RAYS_OWN or "sglang" in child.name():
                names[child.pid] = child.name()
    return names | workers


def _look_at_store(step: int, seen: Seen) -> dict[int, int]:
    """Return the objects and bytes in the object stores of all nodes, and process id -> number of references."""
    import ray
    from ray._private.internal_api import node_stats

    if not ray.is_initialized():
        return {}
    references: dict[int, int] = {}
    objects = size = 0
    for node in ray.nodes():
        if node["Alive"]:
            where = node["NodeManagerAddress"], node["NodeManagerPort"]
            stats = node_stats(*where, include_memory_info=False)
            objects += stats.store_stats.num_local_objects
            size += stats.store_stats.object_store_bytes_used
            references |= {worker.pid: worker.num_object_refs_in_scope for worker in stats.core_workers_stats}
    seen.store_objects[step], seen.store_megabytes[step] = objects, size / 1e6
    return references


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.memory_over_steps")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="on top of what the benchmark trains with")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--from-step", type=int, default=FROM_STEP, help="what is held then is what the end is over")
    options = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(run(options.steps, options.from_step, options.overrides), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
