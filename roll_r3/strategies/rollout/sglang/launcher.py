"""The server's main program: SGLang's own, with the key taken from the environment instead of the command line.

Run by file path under the interpreter that has SGLang, which need not have roll_r3, so it imports the standard library
and SGLang only. Processes that SGLang spawns run the top of this file again before anything else: what a CPU needs is
put in place there for all of them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib import import_module

KEY_VARIABLE = "ROLL_R3_SGLANG_API_KEY"
PARENT_VARIABLE = "ROLL_R3_SGLANG_PARENT"
CPU_PATH_VARIABLE = "ROLL_R3_SGLANG_CPU_PATH"

if cpu_path := os.environ.get(CPU_PATH_VARIABLE):
    if cpu_path not in sys.path:
        sys.path.append(cpu_path)  # last: a real package of the same name wins
    import roll_r3_sglang_cpu  # type: ignore[import-not-found]  # noqa: F401


class HiddenKey(str):
    """A key that does not show where SGLang logs its settings."""

    def __repr__(self) -> str:
        return "'<hidden>'"


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it dies; SGLang's own children do the same.

    Linux only; elsewhere an engine outlives a parent that was killed.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(f"process {parent} that started this server is gone")


def main() -> None:
    die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    key = HiddenKey(os.environ.pop(KEY_VARIABLE))
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]  # this folder's modules must not shadow others

    # By name, because only the interpreter that runs this has SGLang; spawned processes do not come this far.
    launch = import_module("sglang.launch_server")
    server_args = import_module("sglang.srt.server_args").prepare_server_args(sys.argv[1:])
    server_args.api_key = key
    try:
        launch.run_server(server_args)
    finally:
        import_module("sglang.srt.utils").kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
