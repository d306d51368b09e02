"""What integration tests share: gangs of processes that stay up for a module's tests, and tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from compatibility import Compatibility
from distributed import Gang
from faults import Fault
from reliability import write_page


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("fault") and "fault" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid} has the marker `fault` and must take the fixture `fault`")


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """Takes down what the test sees of the fault that its marker names; see faults.py."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "the fixture `fault` is for tests with the marker @pytest.mark.fault(name)"
    return Fault(marker.args[0])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test of a fault passes only if it has said everything of it.

    What passed is written at once, whatever becomes of the tests after it.
    """
    result = yield
    if pyfuncitem.get_closest_marker("fault"):
        fault: Fault = pyfuncitem.funcargs["fault"]
        outcome = fault.outcome
        if pyfuncitem.config.getoption("--write-reliability"):
            write_page({fault.name: outcome})
    return result


@pytest.fixture(scope="module")
def gang() -> Iterator[Callable[[int], Gang]]:
    """`gang(size)`: the module's one gang of that many processes.

    Not the session's: what a module's worlds leave behind in their processes ends with it.
    """
    gangs: dict[int, Gang] = {}

    def of(size: int) -> Gang:
        return gangs.setdefault(size, Gang(size))

    yield of
    for each in gangs.values():
        each.close()


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint of half a million parameters, fp32.

    Its norms are ones, which no product rounds: gradients of many layouts are compared within 1e-6.
    """
    from roll_r3.models.tiny import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_moe"), seed=1, norm_noise=0.0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each tiny model, fp32, as `make_model` makes it."""
    from megatron_cases import make_model

    from roll_r3.models.tiny import TINY_MODELS

    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in TINY_MODELS}


@pytest.fixture(scope="session")
def compatibility() -> Compatibility:
    """What the matrix has run and what was refused, for docs/compatibility.md."""
    return Compatibility()
