"""Whole runs, ended early, also by kill -9, resume with the results of an undisturbed run."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults import Fault
from leftovers import GRACE
from whole_run import RAYS_LAST_WORD, SAMPLED_TO_THE_BIT, START_TIMEOUT, Run, few_steps, finished, learned

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

STEPS = 10
STARTING = "starting hf_infer and 2 training ranks"
STAGES = ("rollout", "rewards", "old log-probs", "update", "weights to the engines", "saving")
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray with a last report to the driver, after the end of Ray's daemon."""
DISK_KB = 9 << 10
"""Size of the small disk in KiB."""
IN_PROCESS = (
    *few_steps(STEPS),
    *SAMPLED_TO_THE_BIT,
    "actor_train.training_args.lr_scheduler_type=cosine",
    "save_steps=1",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_tiny_checkpoint(path, examples=addition_mod10(), warm_start_steps=60)


def start(where: Path, checkpoint: Path, trainer: str, *more: str) -> Run:
    name = f"actor_train.strategy_args.strategy_name={trainer}"
    return Run(where, checkpoint, *IN_PROCESS, name, *more, config="quickstart_engines")


@pytest.fixture(scope="module", params=["megatron_train", pytest.param("fsdp2_train", marks=pytest.mark.long)])
def whole(request, tmp_path_factory, checkpoint) -> tuple[str, Run]:
    """Undisturbed run."""
    return request.param, finished(
        start(tmp_path_factory.mktemp("whole"), checkpoint, request.param, "save_hf_steps=100")
    )


def driver_log(run: Run) -> str:
    """Return the driver's log in the run's directory, including text from the processes before a resume."""
    logs = sorted(run.output.glob("*/latest/logs/driver.log"))
    return logs[-1].read_text() if logs else ""


def wait_until(run: Run, true: Callable[[], bool], every: float = 0.1) -> None:
    deadline = time.monotonic() + 2 * START_TIMEOUT
    while not true():
        assert run.process.poll() is None, run.stderr.read_text()
        assert time.monotonic() < deadline, run.stderr.read_text()
        time.sleep(every)


def kill_in(run: Run, step: int, stage: str, seen: int) -> bool:
    """Kill only the driver, at the beginning of a stage; return True if it died in this stage.

    Args:
        step: 0 for a stage of the start.
        seen: length of the driver's log written by earlier processes, in characters.
    """
    name = f": step {step}: {stage}" if step else f": {stage}"
    wait_until(run, lambda: name in driver_log(run)[seen:], every=0.003)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    if stage == "saving":  # the next step may have begun meanwhile
        return step not in saved_steps(run)
    return driver_log(run).splitlines()[-1].endswith(name) or not step


def seconds_to_resume(run: Run, *, after: int) -> float:
    """Return the seconds until the resumed run has made its first step."""
    began = time.monotonic()
    wait_until(run, lambda: "sending the first weights" in run.stderr.read_text())
    wait_until(run, lambda: len(run.metrics()) > after)
    assert f"resuming after step {after}, from" in run.stderr.read_text()
    return time.monotonic() - began


def assert_nothing_left(run: Run, grace: float = GRACE, *, may_stay: tuple[str, ...] = ()) -> None:
    left = run.started.left(grace, may_stay=may_stay)
    assert left == [], "left behind:\n" + "\n".join(left)


def saved_steps(run: Run) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run.path / "checkpoints").glob("step-*[0-9]"))]


@pytest.mark.long
@pytest.mark.fault("the driver is killed with kill -9, while it starts and in each stage of a step")
def test_a_driver_that_is_killed_in_any_stage_goes_on(fault: Fault, whole, tmp_path, checkpoint, monkeypatch):
    """Kill every process of one run: each makes the lost step and one more, and is killed in the next."""
    trainer, wanted = whole
    if trainer != "megatron_train":
        pytest.skip("the driver is the same")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))

    def process() -> Run:
        slow = "rewards.default.reward=slow_reward:exact_match_slowly"
        return start(tmp_path, checkpoint, trainer, "resume_from_checkpoint=auto", slow)

    runs, seconds, stages, done, seen = [process()], [], [STARTING, *STAGES], 0, 0
    try:
        while stages:
            run = runs[-1]
            if kill_in(run, 0 if stages[0] == STARTING else done + 2, stages[0], seen):
                stages.pop(0)
            assert_nothing_left(run, may_stay=RAYS_OWN)
            said = run.stderr.read_text()
            done = max(saved_steps(run), default=0)
            reported = [int(step) for step in re.findall(r"saved .*/step-(\d+) in", said)]
            assert set(reported) <= set(saved_steps(run)), "what was reported as saved is there"
            assert len(run.metrics()) - done <= 2, "that which is being saved, and the one after it"
            seen = len(driver_log(run)) if done else 0  # without a checkpoint the next run has a new directory
            if not stages and done > 1:  # damage the newest checkpoint too
                os.truncate(shard := shard_of(run.path / "checkpoints" / f"step-{done:08d}"), shard.stat().st_size - 1)
                done -= 1
            assert len(runs) < 2 * len(STAGES), "a stage is too short to be hit"
            runs.append(process())
            if done:
                seconds.append(seconds_to_resume(runs[-1], after=done))
        run = runs[-1]
        assert run.finish(2 * START_TIMEOUT) == 0, run.stderr.read_text()
        print(f"{len(runs) - 1} kills; {max(seconds):.1f} s at most until the lost step was done")
        for each in runs:
            assert_nothing_left(each, RAYS_LAST_WORD)
    finally:
        for each in runs:
            each.end()
    said = run.stderr.read_text()
    assert re.search(rf"step-{done + 1:08d} is DAMAGED: trainer/shard.* bytes, and had", said)
    assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1)), "none lost, none twice"
    assert learned(run) == learned(wanted), "to the bit"
    assert saved_steps(run) == list(range(1, STEPS + 1))
    sent = re.findall(r"weights (\d+): ", (run.path / "logs" / "actor_train-0.log").read_text())
    assert [int(version) for version in sent][-(STEPS - done) - 1 :] == list(range(done, STEPS + 1))
    fault.user_sees("nothing; the last stage is in logs/driver.log. Started again: resuming after step ..., from ...")
    fault.recovered(max(seconds))
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.mark.long
@pytest.mark.fault("the driver and all of its process group are killed with kill -9")
def test_nothing_outlives_a_process_group_that_is_killed(fault: Fault, tmp_path, checkpoint):
    run = start(tmp_path, checkpoint, "megatron_train")
    try:
        run.wait_for_step(1)
        os.killpg(run.process.pid, signal.SIGKILL)
        struck = time.monotonic()
        assert_nothing_left(run, RAYS_LAST_WORD)
        fault.recovered(time.monotonic() - struck)
    finally:
        run.end()
    fault.user_sees("nothing; engines and ranks have process groups of their own, and end by themselves")
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.mark.fault("Ctrl-C, and once more before the run has left")
def test_an_impatient_ctrl_c_leaves_nothing(fault: Fault, tmp_path, checkpoint):
    """Send the signal to every process of the group, as a terminal does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have ignored it for the tests
    run = start(tmp_path, checkpoint, "megatron_train")
    try:
        run.wait_for_step(1)
        struck = time.monotonic()
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert run.process.poll() is None
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(60) == 130, run.stderr.read_text()
        fault.recovered(time.monotonic() - struck)
        assert_nothing_left(run, RAYS_LAST_WORD)
    finally:
        run.end()
    assert run.stderr.read_text().rstrip().endswith("interrupted"), run.stderr.read_text()
    fault.user_sees("interrupted; exit status 130")
    fault.lost("nothing; steps since the last checkpoint are done again, to the bit")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Disk with space for one and a half checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={DISK_KB}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.fault("the disk is full while a checkpoint is written")
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(fault: Fault, whole, tmp_path, checkpoint, small_disk):
    """Fill a mounted disk; without the right to mount one, limit the size of the second rank's files."""
    trainer, wanted = whole
    where = f"checkpoint_config.output_dir={small_disk}"
    run = start(tmp_path, checkpoint, trainer, where)
    try:
        if not os.path.ismount(small_disk):
            run.wait_for_step(1)
            rank = int(re.findall(r"is process (\d+)", (run.path / "logs" / "actor_train-1.log").read_text())[-1])
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (4096, 4096))
        assert run.finish(2 * START_TIMEOUT) == 1, run.stderr.read_text()
    finally:
        run.end()
    said = run.stderr.read_text()
    lost = int(re.search(r"error: step (\d+) was not saved: .*(No space left|File too large)", said)[1])
    assert f"there is {', '.join(f'step {step}' for step in range(1, lost)) or 'nothing'}, and resume" in said
    assert "resuming after" not in said, "another start would find the disk as full"
    folder = next(small_disk.glob("*/*/checkpoints"))
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in range(1, lost)]
    assert lost > 1
    if os.path.ismount(small_disk):
        subprocess.run(["mount", "-o", f"remount,size={100 * DISK_KB}k", small_disk], check=True)
    began = time.monotonic()
    again = start(tmp_path, checkpoint, trainer, where, "resume_from_checkpoint=auto")
    try:
        wait_until(again, lambda: f"saved {folder}/step-{lost:08d}" in again.stderr.read_text())
        fault.recovered(time.monotonic() - began)
        assert again.finish(START_TIMEOUT) == 0, again.stderr.read_text()
    finally:
        again.end()
    assert f"resuming after step {lost - 1}, from" in again.stderr.read_text()
    assert learned(again) == learned(wanted), "to the bit"
    fault.user_sees(
        "error: step 2 was not saved: ... No space left on device; the run stops here; in ... there is step 1"
    )
    fault.lost("nothing; the step that was not saved is done again once there is space")


@pytest.mark.long
@pytest.mark.fault("the disk of a run's directory fills up between two checkpoints")
def test_a_disk_that_fills_up_in_a_step_is_named(fault: Fault, whole, tmp_path, checkpoint, small_disk):
    if not os.path.ismount(small_disk):
        pytest.skip("this user may mount no disk")
    trainer, wanted = whole
    subprocess.run(["mount", "-o", f"remount,size={4 * DISK_KB}k", small_disk], check=True)
    settings = (f"output_dir={small_disk}", "save_steps=5", "num_logged_samples=8")  # more than a page in four steps
    run = start(tmp_path, checkpoint, trainer, *settings)
    run.output = small_disk
    try:
        wait_until(run, lambda: "/step-00000005 in" in run.stderr.read_text(), every=0.01)
        struck = time.monotonic()
        with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 20))  # until the disk is full
        assert run.finish(START_TIMEOUT) == 1, run.stderr.read_text()
        fault.recovered(time.monotonic() - struck)
    finally:
        run.end()
    said = run.stderr.read_text()
    assert "Traceback" not in said
    assert "Logging error" not in said
    error = said[said.rindex("error: ") :]
    assert f"No space left on device: '{small_disk}/" in error
    assert f"Free space on the disk {small_disk} (0 of " in error
    assert len(error.splitlines()) <= 5
    (small_disk / "filler").unlink()
    again = start(tmp_path, checkpoint, trainer, *settings, "resume_from_checkpoint=auto")
    again.output = small_disk
    finished(again)
    assert learned(again) == learned(wanted), "to the bit"
    fault.user_sees(
        "error: [Errno 28] No space left on device: '.../metrics.jsonl', its disk, and what to do; status 1"
    )
    fault.lost("nothing; once there is space, the steps since the last checkpoint are done again, to the bit")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relink(path: Path) -> None:
    path.rename(path.parent.parent.parent / path.name)
    path.symlink_to(path.parent.parent.parent / path.name)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"size"', ' "size"', 1))


DAMAGE = {
    STEPS: (lambda step: os.truncate(shard_of(step), shard_of(step).stat().st_size - 1), r"shard.* bytes, and had \d+"),
    STEPS - 1: (lambda step: flip(shard_of(step)), r"shard.* does not match its checksum"),
    STEPS - 2: (lambda step: (step / "complete").unlink(), "it was not completed: it has no marker"),
    STEPS - 3: (lambda step: edit(step / "manifest.json"), r"manifest\.json does not match the marker"),
    STEPS - 4: (lambda step: relink(step / "state.json"), r"state\.json is neither a file nor a directory"),
}
"""Step -> (damage of its checkpoint, expected message)."""


def shard_of(step: Path) -> Path:
    """Return a file of tensors of a checkpoint."""
    return next((step / "trainer").glob("shard-*.safetensors"))


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory, checkpoint) -> tuple[Run, float]:
    """Run restarted with its five newest checkpoints damaged in five ways, and the seconds until it ended.

    The run must resume from the checkpoint before them.
    """
    trainer, wanted = whole
    if trainer != "megatron_train":
        pytest.skip("the driver is the same")
    where = tmp_path_factory.mktemp("damaged")
    shutil.copytree(wanted.output, where / "output", symlinks=True)
    for step, (damage, _) in DAMAGE.items():
        damage(next((where / "output").glob(f"*/2*/checkpoints/step-{step:08d}")))
    struck = time.monotonic()
    last = f"max_steps={min(DAMAGE) - 1}"
    run = finished(start(where, checkpoint, trainer, "resume_from_checkpoint=auto", last))
    return run, time.monotonic() - struck


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(STEPS, marks=pytest.mark.fault("a checkpoint's file of tensors is truncated")),
        pytest.param(STEPS - 1, marks=pytest.mark.fault("a bit of a checkpoint's tensors flips")),
        pytest.param(STEPS - 2, marks=pytest.mark.fault("a checkpoint's marker is missing")),
        pytest.param(STEPS - 3, marks=pytest.mark.fault("a checkpoint's manifest is edited")),
        pytest.param(STEPS - 4, marks=pytest.mark.fault("a file of a checkpoint is replaced by a link")),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_aloud(fault: Fault, damaged, step):
    run, seconds = damaged
    said = run.stderr.read_text()
    found = re.search(rf"step-{step:08d} is DAMAGED: (.*{DAMAGE[step][1]}.*); looking for one before it", said)
    assert found
    whole_one = min(DAMAGE) - 1
    assert re.search(rf"nothing to do: \S+/step-{whole_one:08d} is of step {whole_one}", said), "it is the one it takes"
    words = re.sub(r"\b\d+\b", "...", re.sub(r"\S*(trainer/)?shard-\S+", "shard-....safetensors", found[1]))
    words = re.sub(r"\S+/(?=state)", "", words)
    fault.user_sees(f"checkpoint .../step-... is DAMAGED: {words}; looking for one before it")
    fault.recovered(seconds)
    fault.lost("nothing; steps since the checkpoint before it are done again")


def test_a_new_run_goes_on_from_a_path(whole, tmp_path, checkpoint):
    """Compare with the original run: FSDP2 to the bit; Megatron, on one rank in the place of two, to rounding."""
    trainer, wanted = whole
    done = STEPS - 2
    step = wanted.path.resolve() / "checkpoints" / f"step-{done:08d}"
    one = ("actor_train.device_mapping=[0]", "actor_train.training_args.per_device_train_batch_size=64")
    layout = one if trainer == "megatron_train" else ()
    run = finished(start(tmp_path, checkpoint, trainer, f"resume_from_checkpoint={step}", *layout))
    said = run.stderr.read_text()
    assert f"resuming after step {done}, from {step}" in said
    assert ("  actor_train.device_mapping: [0, 1] -> [0]" in said) == bool(layout)
    found, known = learned(run), learned(wanted)
    assert found[:done] == known[:done], "the history comes along"
    if not layout:
        assert found == known
    for name, value in known[done].items():
        if name == "router_replay/padded_rows":
            continue  # one rank's micro-batches have other padding than two ranks' ones
        assert found[done][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert found[done + 1]["actor/lr"] == known[done + 1]["actor/lr"]


def test_what_is_exported_of_a_checkpoint_is_what_the_run_writes(whole, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from roll_r3 import export

    _, run = whole
    name = f"step-{STEPS:08d}"
    saved, written = run.path / "checkpoints" / name, run.path / "hf" / name
    arguments = ["--checkpoint", str(saved), "--output", str(tmp_path / "hf")]
    assert export.main(arguments) == 0
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (written / name).read_bytes()
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {path.name for path in written.iterdir()}
    for path in (tmp_path / "hf", written):
        AutoModelForCausalLM.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    assert export.main(arguments) == 2, "never over what is there"
    (tmp_path / "broken").mkdir()
    for file in saved.iterdir():
        if file.is_file() and file.name != "state.json":
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    assert export.main(["--checkpoint", str(tmp_path / "broken"), "--output", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
