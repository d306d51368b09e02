"""All slow imports of a rank, made once by the parent process of all gangs.

Megatron is imported in a thread, because the CPU platform's mode belongs to the thread that enters it. A rank with
megatron enters it again by its own `install`; a rank with FSDP2 never does.
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
