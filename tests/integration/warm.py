"""Imported once by the process that gangs are forked from: everything slow that a rank imports.

Megatron is imported in a thread, because the CPU platform's mode belongs to the thread that enters it. A rank that runs
megatron enters it again by its own `install`; a rank of FSDP2 never does.
"""

from __future__ import annotations

import threading


def _import_trainers() -> None:
    from roll_r3.platform import megatron_cpu

    megatron_cpu.install()
    import roll_r3.trainers.fsdp2.strategy
    import roll_r3.trainers.megatron.strategy  # noqa: F401


_thread = threading.Thread(target=_import_trainers)
_thread.start()
_thread.join()
