"""Whole runs that end before they are done, by kill -9 too, and go on as if they had not."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from whole_run import START_TIMEOUT, Run, few_steps, learned

from roll_r3.data.tiny_task import addition_mod10
from roll_r3.models.tiny import make_tiny_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS = 4
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They look once in a while whether there is something left to serve."""
IN_PROCESS = (
    *few_steps(STEPS),
    "rollout_batch_size=8",
    "actor_infer.strategy_args.strategy_name=hf_infer",
    "actor_infer.strategy_args.strategy_config.dtype=float32",
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


def finish(run: Run) -> Run:
    try:
        assert run.finish(2 * START_TIMEOUT) == 0, run.stderr.read_text()
    finally:
        run.end()
    return run


@pytest.fixture(scope="module", params=["megatron_train", "fsdp2_train"])
def whole(request, tmp_path_factory, checkpoint) -> tuple[str, Run]:
    """A run that nothing stopped."""
    return request.param, finish(
        start(tmp_path_factory.mktemp("whole"), checkpoint, request.param, "save_hf_steps=100")
    )


def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, checkpoint):
    """Killed in the third step or after it, what it saved last damaged: what was lost is done again, to the bit."""
    trainer, wanted = whole
    if trainer != "megatron_train":
        pytest.skip("the driver is the same")
    run = start(tmp_path, checkpoint, trainer, "resume_from_checkpoint=auto", "max_ckpt_to_keep=2")
    processes: list[psutil.Process] = []
    try:
        run.wait_for_step(3)
        processes = run.descendants()
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        _, left = psutil.wait_procs([p for p in processes if not p.name().startswith(RAYS_OWN)], timeout=60)
        assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == [], "they end with the run"
    finally:
        run.end()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    said, folder = run.stderr.read_text(), run.path / "checkpoints"
    saved = [int(step) for step in re.findall(r"saved .*/step-(\d+) in", said)]
    there = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    assert saved[-1] in (2, 3)
    assert saved[-1] in there, "what was reported as saved is there"
    assert len(there) <= 3
    newest = folder / f"step-{there[-1]:08d}"
    part = next((newest / "trainer").iterdir())
    part.write_bytes(part.read_bytes()[:-1])

    again = finish(start(tmp_path, checkpoint, trainer, "resume_from_checkpoint=auto", "max_ckpt_to_keep=2"))
    said = again.stderr.read_text()
    assert f"{newest.name} is DAMAGED: trainer/{part.name} has" in said
    assert f"going on after step {there[-2]}, from" in said
    assert again.path.resolve() == run.path.resolve()
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 4], "none lost, none twice"
    assert learned(again) == learned(wanted)
    sent = re.findall(r"weights (\d+): ", (run.path / "logs" / "actor_train-0.log").read_text())
    assert [int(version) for version in sent][-(STEPS - there[-2]) - 1 :] == list(range(there[-2], STEPS + 1))
    assert sorted(path.name for path in folder.glob("step-*[0-9]")) == ["step-00000003", "step-00000004"]

    last = time.monotonic()
    done = finish(start(tmp_path, checkpoint, trainer, "resume_from_checkpoint=auto"))
    assert "nothing to do" in done.stderr.read_text()
    print(f"a finished run says so in {time.monotonic() - last:.0f} s")
    assert learned(done) == learned(wanted)


def test_a_new_run_goes_on_from_a_path(whole, tmp_path, checkpoint):
    """As the run that it came from: FSDP2's to the bit; Megatron's, on one rank in the place of two, to rounding."""
    trainer, wanted = whole
    step = wanted.path.resolve() / "checkpoints" / "step-00000002"
    one = ("actor_train.device_mapping=[0]", "actor_train.training_args.per_device_train_batch_size=64")
    layout = one if trainer == "megatron_train" else ()
    run = finish(start(tmp_path, checkpoint, trainer, f"resume_from_checkpoint={step}", *layout))
    said = run.stderr.read_text()
    assert f"going on after step 2, from {step}" in said
    assert ("  actor_train.device_mapping: [0, 1] -> [0]" in said) == bool(layout)
    found, known = learned(run), learned(wanted)
    assert found[:2] == known[:2], "the history comes along"
    if not layout:
        assert found == known
    for name, value in known[2].items():
        assert found[2][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert found[3]["actor/lr"] == known[3]["actor/lr"]


def test_what_is_exported_of_a_checkpoint_is_what_the_run_writes(whole, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from roll_r3 import export

    _, run = whole
    saved, written = run.path / "checkpoints" / "step-00000004", run.path / "hf" / "step-00000004"
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
