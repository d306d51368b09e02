"""Fixtures of the integration tests: gangs of processes kept for one module's tests, and tiny checkpoints."""

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
    """Record the outcome of the fault named by the test's marker; see faults.py."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "the fixture `fault` is for tests with the marker @pytest.mark.fault(name)"
    return Fault(marker.args[0])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Pass a fault test only if it recorded the whole outcome of its fault.

    The outcome of a passed test is written at once, independent of the tests after it.
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
    """Return `gang(size)`, the module's only gang of this size.

    The scope is the module, not the session: leftovers of a module's worlds end with its processes.
    """
    gangs: dict[int, Gang] = {}

    def of(size: int) -> Gang:
        return gangs.setdefault(size, Gang(size))

    yield of
    for each in gangs.values():
        each.close()


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE checkpoint of half a million parameters, fp32.

    Its norms are ones, so multiplying by them rounds nothing: gradients of many layouts are compared within 1e-6.
    """
    from roll_r3.models.tiny import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_moe"), seed=1, norm_noise=0.0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint of each tiny model, fp32, made by `make_model`."""
    from megatron_cases import make_model

    from roll_r3.models.tiny import TINY_MODELS

    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in TINY_MODELS}


@pytest.fixture(scope="session")
def compatibility() -> Compatibility:
    """Collector of matrix runs and refusals, for docs/compatibility.md."""
    return Compatibility()
