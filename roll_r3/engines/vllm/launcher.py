"""Main program of a vLLM server: vLLM's own, with middleware for the key from the environment.

It runs by file path under vLLM's interpreter. It need not have roll_r3, so only the standard library,
vLLM and `roll_r3_vllm` are imported; the strategy sets the import path of the last.
"""

from __future__ import annotations

import os
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

KEY_VARIABLE = "ROLL_R3_VLLM_API_KEY"
PARENT_VARIABLE = "ROLL_R3_VLLM_PARENT"


def main() -> None:
    shared = runpy.run_path(str(Path(__file__).parents[2] / "processes.py"))
    shared["die_with_parent"](int(os.environ.pop(PARENT_VARIABLE)))
    shared["leave_folder"](__file__)
    # By name: only this interpreter has them.
    access: Any = import_module("roll_r3_vllm.access")
    access.KEY = os.environ.pop(KEY_VARIABLE).encode()
    entry = import_module("vllm.entrypoints.launchers.api_server.entry")
    arguments = import_module("vllm.entrypoints.launchers.cli_args")
    import_module("vllm.entrypoints.serve.utils.api_utils").cli_env_setup()
    parser = import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    args = arguments.make_arg_parser(parser).parse_args()
    args.middleware = ["roll_r3_vllm.access.RequireKey"]
    arguments.validate_parsed_serve_args(args)
    import_module("uvloop").run(entry.run_server(args))


if __name__ == "__main__":
    main()
