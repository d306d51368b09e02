"""Main program for foreign Python programs: confines itself, then becomes one.

Reads its job, a JSON object with the fields of `roll_r3.rewards.code.sandbox.Job`, from the standard input. Writes to
the standard error only where confinement failed. Uses the standard library only, and starts in isolated mode.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

NOBODY = 65534
"""User and group without rights."""
PROGRAM, INPUT = "main.py", ".input"
"""Files in the program's folder."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_MS_NOSUID, _MS_NODEV = 2, 4
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

_WATCH_S = 0.05
"""Interval of counting the program's processes."""
_DENIED = {  # name -> (number on x86_64, number on aarch64)
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "socket": (41, 198),
    "umount2": (166, 39),
    "unshare": (272, 97),
}
"""System calls refused with EPERM: network, mounts, other processes, and leaving the process group."""
_SIGNALS = {
    "kill": (62, 129),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tgkill": (234, 131),
    "tkill": (200, 130),
}
"""System calls refused where the program sees other processes."""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> (column of the tables, number of the architecture for the filter)."""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the job; exit with the program's code, or 128 + its signal."""
    job = json.load(sys.stdin.buffer)
    if job["drop_user"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
    _die_with(job["parent"])
    if not job["namespaces"]:
        _run(job)
    _enter_namespaces()
    launcher = os.getpid()
    first = os.fork()
    if first == 0:
        _as_first_process(job, launcher)
    os._exit(_code_of(os.waitpid(first, 0)[1]))


def _as_first_process(job: Mapping[str, Any], launcher: int) -> NoReturn:
    """Be process 1 of the namespace: at its end the kernel kills all other processes there."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _mount_folder(job["folder"], job["folder_bytes"])
        program = os.fork()
        if program == 0:
            _run(job)
        for descriptor in (0, 1):
            os.close(descriptor)
        os._exit(_watched(program, job["limits"]["RLIMIT_NPROC"]))
    except BaseException as error:  # noqa: BLE001  every error goes to the parent
        _report(2, error)


def _watched(program: int, most: int) -> int:
    """Return the exit code of the program; the one of SIGKILL once it has too many processes.

    RLIMIT_NPROC does not hold for root.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            return _code_of(status)
        if pid == 0:
            signal.sigtimedwait([signal.SIGCHLD], _WATCH_S)
            if sum(name.isdigit() for name in os.listdir("/proc")) > most + 1:
                return 128 + signal.SIGKILL


def _run(job: Mapping[str, Any]) -> NoReturn:
    """Become the program."""
    report = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        os.chdir(job["folder"])
        for name, text in ((PROGRAM, job["program"]), (INPUT, job["stdin"])):
            with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
        os.dup2(os.open(INPUT, os.O_RDONLY), 0)
        os.unlink(INPUT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for which, value in job["limits"].items():
            hard = value + 1 if which == "RLIMIT_CPU" else value  # SIGXCPU first, which names the reason
            resource.setrlimit(getattr(resource, which), (value, hard))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _filter_system_calls(_DENIED if job["namespaces"] else _DENIED | _SIGNALS)
        os.execve(job["python"], [job["python"], "-I", "-B", "-X", "utf8", PROGRAM], job["environment"])
    except BaseException as error:  # noqa: BLE001  every error goes to the parent
        _report(report, error)


def _report(descriptor: int, error: BaseException) -> NoReturn:
    os.write(descriptor, f"{type(error).__name__}: {error}".encode(errors="replace"))
    os._exit(1)


def _enter_namespaces() -> None:
    """Enter namespaces of users, mounts, processes, network and messages, as an ordinary user of the new one.

    Being no root there, the program loses every capability when it starts.
    """
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount_folder(folder: str, size: int) -> None:
    """Make all files read-only except in the folder, new and in memory."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    numbers = [ctypes.c_long(n) for n in (_MOUNT_SETATTR, _AT_FDCWD)]
    flags, length = ctypes.c_long(_AT_RECURSIVE), ctypes.c_long(len(attributes))
    _check(_libc.syscall(*numbers, b"/", flags, attributes, length), "mount_setattr")
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=10k,mode=777")
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    names = [name and name.encode() for name in (source, target, kind)]
    _check(_libc.mount(*names, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _filter_system_calls(denied: Mapping[str, tuple[int, int]]) -> None:
    """Refuse system calls from here on, in all child processes too. Nothing on unknown machines."""
    if platform.machine() not in _ARCHITECTURES:
        return
    column, architecture = _ARCHITECTURES[platform.machine()]
    numbers = [pair[column] for pair in denied.values()]
    load, equal, at_least, result = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, kill), (load, 0, 0, 0)]
    lines.append((at_least, len(numbers) + 1, 0, 0x40000000))  # x86_64's second table of numbers
    lines += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    lines += [(result, 0, 0, allow), (result, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, *values: int) -> None:
    _check(_libc.prctl(option, *map(ctypes.c_ulong, (*values, 0, 0, 0)[:4])), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _code_of(status: int) -> int:
    """Return the exit code of a child, or 128 + its signal."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    main()
