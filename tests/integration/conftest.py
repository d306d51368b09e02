"""What integration tests share: gangs of processes that stay up for a module's tests, and a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compatibility import Compatibility
from distributed import Gang


@pytest.fixture(scope="module")
def gang() -> Iterator[Callable[[int], Gang]]:
    """`gang(size)`: the module's one gang of that many processes.

    Not the session's: autograd's graph keeps pieces of a world that has trained, and their threads take time from the
    tests that come later.
    """
    gangs: dict[int, Gang] = {}

    def of(size: int) -> Gang:
        return gangs.setdefault(size, Gang(size))

    yield of
    for each in gangs.values():
        each.close()


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint of half a million parameters, fp32."""
    from roll_r3.models.tiny import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_moe"), seed=1)


@pytest.fixture(scope="session")
def compatibility() -> Compatibility:
    """What the matrix has run and what was refused, for docs/compatibility.md."""
    return Compatibility()
