"""Misbehaving programs in the sandbox of the reward `code`."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from roll_r3.rewards.code import sandbox
from roll_r3.rewards.code.sandbox import Ended, Level, Limits, SandboxError, level, run, weaknesses

pytestmark = pytest.mark.integration

PLAIN, OWN = Level(namespaces=False, drop_user=False), Level(namespaces=True, drop_user=False)
LEVELS = {"a process group": PLAIN, "namespaces": OWN}
QUICK = Limits(seconds=1.0)


def works(at: Level) -> bool:
    try:
        return run("print(1)", "", Limits(), at).output == "1\n"
    except SandboxError:
        return False


needs_namespaces = pytest.mark.skipif(not works(OWN), reason="this kernel or container allows no namespaces")


@pytest.fixture(params=LEVELS.values(), ids=LEVELS.keys())
def at(request: pytest.FixtureRequest) -> Level:
    chosen: Level = request.param
    if chosen.namespaces and not works(chosen):
        pytest.skip("this kernel or container allows no namespaces")
    return chosen


def left() -> list[str]:
    """Return folders and processes left behind by sandboxes of this process."""
    mark = f"roll_r3-code-{os.getpid()}-"
    deadline = time.monotonic() + 5
    while True:
        folders = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{mark}*")]
        homes = [(process.info["environ"] or {}).get("HOME", "") for process in psutil.process_iter(["environ"])]
        found = folders + [home for home in homes if mark in home]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_a_program_reads_its_input_and_prints(at: Level) -> None:
    program = "import sys\nprint(input() + '!', sys.stdin.read())\nprint('not read', file=sys.stderr)"
    assert run(program, "ä\nrest", QUICK, at) == Ended(0, "ä! rest\n")
    assert run("raise SystemExit(3)", "", QUICK, at) == Ended(3, "", "exited with code 3")
    assert left() == []


FAILS = {
    "computes forever": ("while True: pass", "took more than 1 s of processor time"),
    "allocates too much": ("x = bytearray(2 << 30)", "exited with code 1"),
    "prints megabytes": ("while True: print('x' * 100000)", "printed more than 1048576 bytes"),
    "writes a large file": ("open('x', 'wb').write(bytes(17 << 20))", "exited with code 1"),
    "opens many files": ("x = [open('/dev/null') for _ in range(100)]", "exited with code 1"),
    "opens a socket": ("import socket; socket.socket()", "exited with code 1"),
    "opens a local socket": ("import socket; socket.socket(socket.AF_UNIX)", "exited with code 1"),
    "leaves its session": ("import os; os.setsid()", "exited with code 1"),
    "kills everything": ("import os; os.kill(-1, 9)", "exited with code 1"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
    "is no Python": ("def (", "exited with code 1"),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_program_past_its_limits_is_ended(at: Level, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_WALL_FACTOR", 9)  # on a busy machine the processor limit comes later
    program, why = FAILS[name]
    began = time.monotonic()
    ended = run(program, "", QUICK, at)
    assert ended.why == why
    assert time.monotonic() - began < 10
    assert left() == []


def test_a_program_that_waits_is_ended(at: Level) -> None:
    began = time.monotonic()
    ended = run("import time; print('a', flush=True); time.sleep(100)", "", Limits(seconds=0.5), at)
    assert ended == Ended(None, "a\n", "did not end within 1 s")
    assert time.monotonic() - began < 5
    assert left() == []


@pytest.mark.parametrize("parent", ["waits", "ends"])
def test_processes_started_by_a_program_end_with_it(at: Level, parent: str) -> None:
    rest = "time.sleep(100)" if parent == "waits" else "print('done')"
    program = f"import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(100)\n{rest}"
    ended = run(program, "", Limits(seconds=0.5), at)
    assert ended.output == ("" if parent == "waits" else "done\n")
    assert left() == []


def test_a_program_that_kills_its_parent_harms_nobody(at: Level) -> None:
    run("import os; os.kill(os.getppid(), 9)", "", QUICK, at)
    run("import os; os.kill(0, 9)", "", QUICK, at)
    assert run("print(2)", "", QUICK, at).output == "2\n"
    assert left() == []


@needs_namespaces
def test_a_program_that_forks_forever_is_ended() -> None:
    began = time.monotonic()
    assert not run("import os\nwhile True: os.fork()", "", Limits(seconds=2.0), OWN).output
    assert run("import os, time\nfor _ in range(20): os.fork() or time.sleep(9)", "", QUICK, OWN).code != 0
    assert time.monotonic() - began < 20
    assert left() == []


@needs_namespaces
def test_only_the_own_folder_is_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    program = "open({!r}, 'w').write('x')"
    assert run(program.format("here"), "", QUICK, OWN).code == 0
    for place in (tmp_path / "file", "/dev/shm/roll_r3-test", Path(__file__).parent / "file"):
        assert run(program.format(str(place)), "", QUICK, OWN).why == "exited with code 1"
        assert not Path(place).exists()
    whole = "for i in range(9): open(f'{i}', 'wb').write(bytes(9 << 20))"
    assert run(whole, "", QUICK, OWN).why == "exited with code 1", "the folder has a size"


@needs_namespaces
def test_other_processes_and_the_network_are_out_of_sight() -> None:
    seen = run(
        "import os; print(sum(n.isdigit() for n in os.listdir('/proc')), os.listdir('/sys/class/net'))", "", QUICK, OWN
    )
    assert int(seen.output.split()[0]) == 2
    counted = run("print(open('/proc/net/dev').read().count(':'))", "", QUICK, OWN)
    assert counted.output == "1\n", "the loopback device only"


def test_a_program_has_nothing_of_the_runs_environment(at: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    program = "import os; print(sorted(os.environ))"
    assert "JUDGE_API_KEY" not in run(program, "", QUICK, at).output


def test_libraries_of_the_run_can_be_imported(at: Level) -> None:
    assert run("import numpy; print(numpy.arange(3).sum())", "", Limits(), at).output == "3\n"


def test_the_strongest_level_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    level.cache_clear()
    weaknesses.cache_clear()
    try:
        strongest = level()
        assert strongest.namespaces == works(OWN)
        assert (weaknesses() == "") == strongest.namespaces
        monkeypatch.setattr(sandbox, "run", _without_namespaces(sandbox.run))
        level.cache_clear()
        weaknesses.cache_clear()
        assert not level().namespaces
        assert "it may start any number of processes" in weaknesses()
        assert ("keys" in weaknesses()) != level().drop_user
        assert "network" not in weaknesses(), "system calls are filtered without namespaces too"
        monkeypatch.setattr(sandbox.sys, "executable", "/no/such/python")
        level.cache_clear()
        with pytest.raises((SandboxError, OSError)):
            level()
    finally:
        level.cache_clear()
        weaknesses.cache_clear()


def _without_namespaces(real: object) -> object:
    def run_plain(program: str, stdin: str, limits: Limits, at: Level | None = None) -> Ended:
        at = at or level()
        if at.namespaces:
            raise SandboxError("unshare: Operation not permitted")
        return real(program, stdin, limits, at)  # type: ignore[operator, no-any-return]

    return run_plain
