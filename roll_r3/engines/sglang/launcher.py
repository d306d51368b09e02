"""Main program of an SGLang server: SGLang's own, with the key from the environment instead of the command line.

It runs by file path under SGLang's interpreter. It need not have roll_r3, so only the standard library
and SGLang are imported. Processes spawned by SGLang run the top of this file first: the modules needed on a CPU are put
on their path there.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib import import_module
from pathlib import Path

KEY_VARIABLE = "ROLL_R3_SGLANG_API_KEY"
PARENT_VARIABLE = "ROLL_R3_SGLANG_PARENT"
CPU_PATH_VARIABLE = "ROLL_R3_SGLANG_CPU_PATH"

if cpu_path := os.environ.get(CPU_PATH_VARIABLE):
    if cpu_path not in sys.path:
        sys.path.append(cpu_path)  # last: a real package of the same name wins
    import roll_r3_sglang_cpu  # noqa: F401


class HiddenKey(str):
    """A key hidden in SGLang's log of its settings."""

    def __repr__(self) -> str:
        return "'<hidden>'"


def main() -> None:
    shared = runpy.run_path(str(Path(__file__).absolute().parents[2] / "processes.py"))
    shared["die_with_parent"](int(os.environ.pop(PARENT_VARIABLE)))  # SGLang's own children do the same
    key = HiddenKey(os.environ.pop(KEY_VARIABLE))
    shared["leave_folder"](__file__)

    # By name: only this interpreter has SGLang. Spawned processes do not come this far.
    launch = import_module("sglang.launch_server")
    server_args = import_module("sglang.srt.server_args").prepare_server_args(sys.argv[1:])
    server_args.api_key = key
    # By default its ranks meet at a store that listens on every address of this machine without a key.
    folder = os.environ.pop(shared["FOLDER_VARIABLE"])
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{folder}/store"
    os.environ |= {"MASTER_ADDR": server_args.host, "MASTER_PORT": str(server_args.port)}  # names for shared memory
    try:
        launch.run_server(server_args)
    finally:
        import_module("sglang.srt.utils").kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
