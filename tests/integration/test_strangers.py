"""View of a run from the network and from another user of the machine: no open port, no key."""

from __future__ import annotations

import ipaddress
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from whole_run import Run, few_steps

from roll_r3.cluster.ray_session import TOKEN_VARIABLE
from roll_r3.data.tiny_task import addition_mod10
from roll_r3.engines.sglang.launcher import KEY_VARIABLE
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.processes import FOLDER_VARIABLE

pytestmark = pytest.mark.integration

HUB_TOKEN = "hf_a-token-of-the-hub-that-is-in-the-environment"
HF_INFER = "actor_infer.strategy_args={strategy_name: hf_infer}"
ASK_RAY = """
import sys
from ray._raylet import GcsClient
print("let in", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", examples=addition_mod10())


@pytest.fixture(scope="module", params=["sglang", "hf_infer"])
def run(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run in its second step or later, with a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", HUB_TOKEN)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", TOKEN_VARIABLE):
            patch.delenv(name, raising=False)
        engine = (HF_INFER,) if request.param == "hf_infer" else ()
        run = Run(tmp_path_factory.mktemp("run"), checkpoint, *few_steps(500, "save_steps=1", *engine))
    try:
        run.wait_for_step(2)
        yield run
    finally:
        run.end()


def processes(run: Run) -> list[psutil.Process]:
    return [psutil.Process(run.process.pid), *run.descendants()]


def servers(run: Run) -> list[psutil.Process]:
    """Return SGLang's processes; none if the engine is in the actor's own process."""
    return [p for p in run.descendants() if any("launcher.py" in part for part in p.cmdline())]


def token(run: Run) -> str:
    """Return Ray's token, from the environment of its processes."""
    return next(p for p in run.descendants() if p.name() == "raylet").environ()[TOKEN_VARIABLE]


def session(run: Run) -> Path:
    """Return Ray's session directory."""
    line = next(p for p in run.descendants() if p.name() == "gcs_server").cmdline()
    return Path(next(part.removeprefix("--session-dir=") for part in line if part.startswith("--session-dir=")))


def test_everything_listens_on_loopback_alone(run: Run) -> None:
    """Check SGLang and its scheduler, the receiver of weights, gloo, the stores where ranks meet, and all of Ray."""
    found = []
    for process in processes(run):
        with_name = process.name()
        for one in process.net_connections("inet"):
            if one.status == psutil.CONN_LISTEN or (one.type.name == "SOCK_DGRAM" and not one.raddr):
                address = ipaddress.ip_address(one.laddr.ip)
                found.append((with_name, getattr(address, "ipv4_mapped", None) or address, one.laddr.port))
    names = {name for name, _, _ in found}
    assert {"gcs_server", "raylet"} < names
    assert sum(name.startswith("ray::ModelWorker") for name, _, _ in found) >= 6, "gloo, in three ranks"
    assert [one for one in found if not one[1].is_loopback] == []


def test_nobody_else_reaches_what_ray_makes_writable_for_everyone(run: Run) -> None:
    made = session(run)
    assert any(path.stat().st_mode & stat.S_IWOTH for path in (made.parent, made)), "else nothing need be closed"
    closed = made.parents[1]
    assert closed.name.startswith("r3-ray-")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert closed.stat().st_uid == os.getuid()


def test_ray_lets_nobody_in_without_the_token(run: Run) -> None:
    line = next(p for p in run.descendants() if p.name() == "raylet").cmdline()
    address = next(part.removeprefix("--gcs-address=") for part in line if part.startswith("--gcs-address="))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    said = {}
    for name, given in (("right", token(run)), ("wrong", "0" * 64), ("none", "")):
        with_token = plain | ({"RAY_AUTH_MODE": "token", TOKEN_VARIABLE: given} if given else {})
        command = [sys.executable, "-c", ASK_RAY, address]
        said[name] = subprocess.run(command, env=with_token, capture_output=True, text=True, timeout=60)
    assert said["right"].stdout == "let in 1\n"
    for name in ("wrong", "none"):
        assert said[name].stdout == ""
        assert "InvalidAuthToken" in said[name].stderr


def test_no_key_is_in_a_file_or_on_a_command_line(run: Run) -> None:
    secrets = {"token of Ray": token(run), "token of the hub": HUB_TOKEN}
    for server in servers(run):
        secrets["key of SGLang"] = server.environ()[KEY_VARIABLE]
        assert TOKEN_VARIABLE not in server.environ(), "what is not its own"
    assert all(len(secret) > 20 for secret in secrets.values())
    files = [
        path for path in [*run.output.rglob("*"), *session(run).rglob("*"), run.stdout, run.stderr] if path.is_file()
    ]
    kinds = {path.name.split(".")[0] for path in files}
    assert {"config", "metrics", "events", "driver", "state", "manifest", "gcs_server"} <= kinds
    for path in files:
        content = path.read_bytes()
        assert [name for name, secret in secrets.items() if secret.encode() in content] == [], path
    for process in processes(run):
        assert [name for name, secret in secrets.items() if secret in " ".join(process.cmdline())] == []
        if Path(f"/proc/{process.pid}/environ").exists():
            mode = os.stat(f"/proc/{process.pid}/environ").st_mode
            assert not mode & (stat.S_IRGRP | stat.S_IROTH), "the environment is its owner's alone"


def test_where_the_ranks_of_an_engine_met_is_removed(run: Run) -> None:
    """Last test: it ends the run."""
    places = {Path(server.environ()[FOLDER_VARIABLE]) for server in servers(run)}
    assert len(places) == len(servers(run))
    for place in places:
        assert (place / "store").exists()
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    os.kill(run.process.pid, signal.SIGTERM)
    run.finish(120)
    assert [place for place in places if place.exists()] == []
