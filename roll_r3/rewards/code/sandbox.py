"""Sandbox for foreign Python programs: a child process with limits and without network, removed with its children.

Levels of confinement are tried once, the strongest first, because containers and kernels forbid some of them.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

from roll_r3.rewards.code.confined import NOBODY

_CONFINED = Path(__file__).with_name("confined.py")
_POLL_S = 0.05
_WALL_FACTOR = 2
"""Wall time allowed to a program, in multiples of its processor time."""
_END_S = 5.0
"""Seconds for the kernel to end a killed program."""
_PROBE = "import threading; t = threading.Thread(target=print, args=('ran',)); t.start(); t.join()"
_NETWORK = "import socket; socket.socket()"


@dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    seconds: float = 10.0
    """Processor time. Twice this may pass in all."""
    memory: int = 1 << 30
    """Address space of each process, bytes."""
    file_bytes: int = 16 << 20
    """Size of a file, bytes. In namespaces four times this is the size of all files."""
    open_files: int = 64
    processes: int = 16
    """Processes; enforced in namespaces only."""
    output: int = 1 << 20
    """Bytes of the standard output; beyond them the program is killed."""


@dataclass(frozen=True)
class Level:
    """Means of confinement."""

    namespaces: bool
    """New namespaces: no network, no other processes, all files read-only but the program's folder."""
    drop_user: bool
    """Run as the user nobody; only root can."""

    def __str__(self) -> str:
        user = ", as the user nobody" if self.drop_user else ""
        return ("namespaces of its own" if self.namespaces else "a process group of its own") + user


@dataclass(frozen=True)
class Job:
    """Job of `confined.py`, sent as JSON."""

    program: str
    stdin: str
    folder: str
    folder_bytes: int
    limits: dict[str, int]
    environment: dict[str, str]
    python: str
    parent: int
    namespaces: bool
    drop_user: bool


@dataclass(frozen=True)
class Ended:
    """End of a program."""

    code: int | None
    """Exit code, 128 + n after signal n; None: killed for a limit of its time or output."""
    output: str
    """Standard output."""
    why: str = ""
    """Reason other than an exit code of 0, in words."""


class SandboxError(Exception):
    """Error: the sandbox itself could not be set up."""


@cache
def level() -> Level:
    """Return the strongest working level of this machine.

    Raises:
        SandboxError: none works.
    """
    root = os.geteuid() == 0
    errors = []
    for candidate in [Level(ns, user) for ns in (True, False) for user in ((True, False) if root else (False,))]:
        try:
            ended = run(_PROBE, "", Limits(), candidate)
        except SandboxError as error:
            errors.append(f"{candidate}: {error}")
            continue
        if ended.output == "ran\n":
            return candidate
        errors.append(f"{candidate}: the test program {ended.why or 'printed nothing'}")
    raise SandboxError("; ".join(errors))


@cache
def weaknesses() -> str:
    """Describe the rights left to a program on this machine; empty in namespaces."""
    if level().namespaces:
        return ""
    lacks = ["it may start any number of processes"]
    if not level().drop_user:
        lacks.append("it may read and change every file of this run's user, and read the environment with its keys")
    if run(_NETWORK, "", Limits()).code == 0:
        lacks.append("it may use the network")
    return ", ".join(lacks)


def run(program: str, stdin: str, limits: Limits, at: Level | None = None) -> Ended:
    """Run a Python program, and end it with all of its processes.

    Raises:
        SandboxError: the program was not started.
    """
    at = at or level()
    folder = tempfile.mkdtemp(prefix=f"roll_r3-code-{os.getpid()}-")
    try:
        if at.drop_user:
            os.chown(folder, NOBODY, NOBODY)
        with tempfile.TemporaryFile() as job:
            job.write(json.dumps(asdict(_job(program, stdin, folder, limits, at))).encode())
            job.seek(0)
            return _run(job, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(program: str, stdin: str, folder: str, limits: Limits, at: Level) -> Job:
    resources = {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": max(1, round(limits.seconds)),
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
    }
    if at.namespaces:  # elsewhere the limit counts all processes of the user
        resources["RLIMIT_NPROC"] = limits.processes
    environment = {"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "TMPDIR": folder}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return Job(
        program, stdin, folder, 4 * limits.file_bytes, resources, environment, sys.executable, os.getpid(), **asdict(at)
    )


def _run(job: IO[bytes], limits: Limits) -> Ended:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CONFINED)],
        stdin=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        output, errors, why = _read(process, limits)
    finally:
        _kill(process)
        process.stdout.close()
        process.stderr.close()
    if errors:
        raise SandboxError(errors.decode(errors="replace").strip())
    text = output.decode(errors="replace")
    if why:
        return Ended(None, text, why)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Ended(code, text, _meaning(code, limits))


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes, str]:
    """Return output, errors of the confinement, and the exceeded limit, if any."""
    deadline = time.monotonic() + _WALL_FACTOR * limits.seconds
    found = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in found:
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ended = process.poll() is not None
            for key, _ in selector.select(_POLL_S):
                data = os.read(key.fd, 1 << 16)
                found[key.fileobj] += data  # type: ignore[index]
                if not data:
                    selector.unregister(key.fileobj)
            if len(found[process.stdout]) > limits.output:
                return bytes(found[process.stdout]), b"", f"printed more than {limits.output} bytes"
            if ended:
                _kill(process)  # a process left behind may hold the pipes
                break
            if time.monotonic() > deadline:
                return bytes(found[process.stdout]), b"", f"did not end within {_WALL_FACTOR * limits.seconds:g} s"
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.returncode is None:
            return bytes(found[process.stdout]), b"", f"did not end within {_WALL_FACTOR * limits.seconds:g} s"
    return bytes(found[process.stdout]), bytes(found[process.stderr]), ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def _meaning(code: int, limits: Limits) -> str:
    if code == 0:
        return ""
    if code == 128 + signal.SIGXCPU:
        return f"took more than {limits.seconds:g} s of processor time"
    if code > 128:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"exited with code {code}"
