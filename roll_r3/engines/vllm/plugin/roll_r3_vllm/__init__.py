"""Plugin of a vLLM server: new weights over a torch.distributed group, and a check of the key.

It is on the import path of the server's processes, which need not have roll_r3. vLLM finds it in each of its processes
by the metadata beside this package.
"""

from __future__ import annotations

import multiprocessing
import runpy
from pathlib import Path

BACKEND = "roll_r3"
"""Name of this transport in `--weight-transfer-config`."""


def register() -> None:
    """Register the transport. vLLM calls this in each of its processes, in some more than once."""
    # vLLM watches its workers only; the process above them would outlive a killed server.
    if (parent := multiprocessing.parent_process()) is not None:
        shared = runpy.run_path(str(Path(__file__).parents[4] / "processes.py"))
        shared["die_with_parent"](parent.pid)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "roll_r3_vllm.weights", "GroupWeights")
