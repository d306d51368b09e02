"""What a vLLM server of roll_r3 has beside vLLM's own: new weights over a torch.distributed group, and a guarded door.

On the import path of the server's processes, which need not have roll_r3. vLLM finds it by the metadata that lies
beside this package, in every process that it starts.
"""

from __future__ import annotations

import multiprocessing
import runpy
from pathlib import Path

BACKEND = "roll_r3"
"""What `--weight-transfer-config` calls the way in which weights come."""


def register() -> None:
    """Called by vLLM in each of its processes, in some more than once."""
    # vLLM's own watch is over workers; the process above them would outlive a server that was killed.
    if (parent := multiprocessing.parent_process()) is not None:
        shared = runpy.run_path(str(Path(__file__).parents[4] / "processes.py"))
        shared["die_with_parent"](parent.pid)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "roll_r3_vllm.weights", "GroupWeights")
