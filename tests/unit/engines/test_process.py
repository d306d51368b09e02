"""A killed server's shared memory and directory go with it, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_r3.engines import folders
from roll_r3.engines.process import ServerProcess
from roll_r3.errors import EngineError
from roll_r3.processes import FOLDER_VARIABLE

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux's shared memory")

CODE = """
import mmap, os, sys, time
if os.fork():
    os.wait()
held = []
for path in sys.argv[1:]:
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(file, 4096)
    held.append(mmap.mmap(file, 4096))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def paths() -> Iterator[tuple[Path, Path]]:
    """Paths of the server's own segment, and of an older one."""
    own, older = (Path(f"/dev/shm/roll_r3_test_{os.getpid()}_{name}") for name in ("own", "older"))
    older.write_bytes(bytes(4096))
    yield own, older
    own.unlink(missing_ok=True)
    older.unlink(missing_ok=True)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_shared_memory_of_a_childs_child_is_removed(tmp_path: Path, paths: tuple[Path, Path], killed: bool) -> None:
    own, older = paths

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch([sys.executable, "-c", CODE, str(own), str(older)], os.environ)
        while "ready" not in process.log_tail():
            await asyncio.sleep(0.05)
        if killed:
            process.started()
            os.killpg(process.pid or 0, signal.SIGKILL)
            await process.death
        assert own.exists()
        await process.stop()
        assert not own.exists()
        assert older.exists()
        await process.stop()

    asyncio.run(scenario())


ENDS = """
import mmap, os, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(file, 4096)
held = mmap.mmap(file, 4096)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.05)
"""


@pytest.mark.parametrize("then", ["launched again", "stopped"])
def test_what_a_server_held_that_ended_while_it_started_is_removed(
    tmp_path: Path, paths: tuple[Path, Path], then: str
) -> None:
    own, older = paths
    end = tmp_path / "end"

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch([sys.executable, "-c", ENDS, str(own), str(end)], os.environ)
        deadline = time.monotonic() + 20
        while str(own) not in process._segments and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        end.touch()
        await process.death
        assert own.exists()
        if then == "launched again":
            process.launch(["sleep", "600"], os.environ)
            assert not own.exists(), "else it would count as what was there before the second"
        await process.stop(grace_s=0.0)
        assert not own.exists()
        assert older.exists()

    asyncio.run(scenario())


MAKER = f"""
import asyncio, os, sys
from pathlib import Path
from roll_r3.engines.process import ServerProcess

async def main():
    process = ServerProcess("server", Path(sys.argv[1]))
    process.launch([sys.executable, "-c", {ENDS!r}, *sys.argv[2:]], os.environ)
    print(process.pid, flush=True)
    await process.death

asyncio.run(main())
"""


def test_what_a_server_holds_whose_maker_is_killed_while_it_starts_is_removed_by_the_next_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path]
) -> None:
    own, _ = paths
    command = [sys.executable, "-c", MAKER, str(tmp_path / "log"), str(own), str(tmp_path / "never")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        server = int(maker.stdout.readline())
        (folder,) = tmp_path.glob("roll_r3-server-*")
        deadline = time.monotonic() + 20
        while not (folder / "shared_memory").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        maker.kill()
    os.killpg(server, signal.SIGKILL)  # as the kernel does after the parent's death
    assert own.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders.remove_orphaned()
    assert not own.exists() and not folder.exists()


def test_a_server_that_has_started_is_not_looked_at_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the look after the start: reading many mappings takes long and locks them."""

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch(["sleep", "600"], os.environ)
        process.started()
        with monkeypatch.context() as patch:
            patch.setattr(process, "_note_shared_memory", lambda: pytest.fail("looked"))
            await asyncio.wait([process.death], timeout=1.0)
            assert not process.death.done()
        await process.stop(grace_s=0.0)

    asyncio.run(scenario())


SEMAPHORE = """
import multiprocessing, time
held = multiprocessing.get_context("spawn").Semaphore()
print("ready", held._semlock.name, flush=True)
time.sleep(600)
"""


def test_a_semaphore_that_the_kernel_shows_under_another_name_is_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch([sys.executable, "-c", SEMAPHORE], os.environ)
        while "ready" not in process.log_tail():
            await asyncio.sleep(0.05)
        name = Path(f"/dev/shm/sem.{process.log_tail().split()[1].lstrip('/')}")
        assert name.exists()
        await process.stop(grace_s=0.0)  # its own resource tracker is killed with it
        assert not name.exists()

    asyncio.run(scenario())


FOLDER = f"""
import os, time
folder = os.environ["{FOLDER_VARIABLE}"]
open(os.path.join(folder, "store"), "w").close()
print("ready", folder, oct(os.stat(folder).st_mode & 0o777), flush=True)
time.sleep(600)
"""


def test_the_folder_of_a_server_that_was_killed_is_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        folders = []
        for _ in range(2):
            process.launch([sys.executable, "-c", FOLDER], os.environ)
            while "ready" not in process.log_tail():
                await asyncio.sleep(0.05)
            _, name, mode = process.log_tail().split()
            folders.append(Path(name))
            assert (folders[-1] / "store").exists()
            assert mode == "0o700"
            os.killpg(process.pid or 0, signal.SIGKILL)
            await process.death
        assert not folders[0].exists(), "the next launch of the same server has another"
        await process.stop()
        assert not folders[1].exists()

    asyncio.run(scenario())


def test_what_is_left_is_removed_whose_makers_were_killed_before_they_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path]
) -> None:
    own_segment, older = paths
    own_segment.touch()
    elsewhere = tmp_path / "file"
    elsewhere.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as gone:
        pass
    here = folders.here()
    makers = (
        f"{here}-{gone.pid}",
        f"{here}-{os.getppid()}",
        f"somewhere-{gone.pid}",
        f"{here}-{'9' * 30}",
        f"{here}-²",
        "x",
    )
    orphaned, living, *others = (tmp_path / f"roll_r3-server-{maker}-x" for maker in makers)
    for folder in (orphaned, living, *others):
        folder.mkdir()
        (folder / "store").touch()
    (orphaned / "shared_memory").write_text(f"{own_segment}\n/dev/shm/gone\n{elsewhere}")

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch(["sleep", "600"], os.environ)
        (own,) = tmp_path.glob(f"roll_r3-server-{here}-{os.getpid()}-*")
        assert not orphaned.exists() and not own_segment.exists()
        await process.stop()
        assert not own.exists()

    asyncio.run(scenario())
    assert all(path.exists() for path in (living / "store", *others, older, elsewhere))


@pytest.mark.parametrize("elsewhere", ["another boot", "another namespace", "no boot", "no namespace"])
def test_what_was_made_elsewhere_or_perhaps_elsewhere_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path], elsewhere: str
) -> None:
    """Imitate machines with a shared disk: their first process namespace has the same number on all of them."""
    _, older = paths
    boot = tmp_path / "boot_id"
    boot.write_text("0e2c8b1f-73b5-4a69-9d06-5cf8f3e4a7d2\n" if elsewhere == "another boot" else "\n")
    there = {
        "another boot": ("_BOOT", boot),
        "another namespace": ("_NAMESPACE", tmp_path),
        "no boot": ("_BOOT", boot),
        "no namespace": ("_NAMESPACE", tmp_path / "none"),
    }
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as gone:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(folders, *there[elsewhere])
        with monkeypatch.context() as dead:
            dead.setattr(os, "getpid", lambda: gone.pid)
            made = folders.make()
        folders.note(made, {str(older)})
        if elsewhere.startswith("no "):
            folders.remove_orphaned()  # unknown origin: possibly made on another machine
    folders.remove_orphaned()
    assert made.exists() and older.exists()


def test_a_folders_name_is_short() -> None:
    """Keep socket paths within 107 characters: some engines put sockets into the folder."""
    made = folders.make()
    folders.remove(made)
    assert len(made.name) <= len("roll_r3-server-0123456789ab-4194304-abcdefgh")


def test_a_disk_without_room_is_an_engine_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "file" / "log")
        with pytest.raises(EngineError, match=r"server: cannot run sleep: .*file"):
            process.launch(["sleep", "600"], os.environ)
        await process.stop()

    asyncio.run(scenario())
    assert list(tmp_path.glob("roll_r3-server-*")) == []


def test_a_folder_names_the_shared_memory_that_its_server_holds(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    own, older = paths

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch([sys.executable, "-c", CODE, str(own), str(older)], os.environ)
        while "ready" not in process.log_tail():
            await asyncio.sleep(0.05)
        process.started()
        assert process._folder is not None
        assert (process._folder / "shared_memory").read_text() == str(own)
        await process.stop()

    asyncio.run(scenario())


def test_without_a_grace_it_is_killed_and_its_number_is_let_be_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        for _ in range(2):
            process.launch(["sleep", "600"], os.environ)
            await process.stop(grace_s=0.0)
            assert process.death.result() == -signal.SIGKILL, "nothing was asked of it"
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", lambda *_: pytest.fail("the number may be another's by now"))
            await process.stop()

    asyncio.run(scenario())


def test_what_it_left_is_removed_although_it_takes_long_to_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel the wait for the server, as at the end of a run."""

    async def scenario() -> None:
        process = ServerProcess("server", tmp_path / "log")
        process.launch(["sleep", "600"], os.environ)
        folder = process._folder
        assert folder is not None and folder.exists()
        with monkeypatch.context() as patch:
            patch.setattr("roll_r3.engines.process._living", lambda group: [group])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(process.stop(grace_s=0.0), 0.3)
            assert not folder.exists()
        await process.stop()

    asyncio.run(scenario())
