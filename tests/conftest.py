"""Settings shared by all tests."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import settings

# Read when torch is imported, here and in every process started by a test: many processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A process reads Ray's token once. Without one here, the first cluster of a test process would take the token in the
# home directory, and a later one, with a token of its own, could not be reached.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# A property is judged by its result: on a busy machine an example's time says nothing. The examples are the same every
# time, so a change is judged by its own effect. `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")

INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test under integration/, also those without the marker."""
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.integration)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options here, because pytest reads them only from the top."""
    parser.addoption(
        "--write-compatibility", action="store_true", help="write docs/compatibility.md from what the matrix ran"
    )
    parser.addoption(
        "--write-engines", action="store_true", help="run every rollout with every trainer and write docs/engines.md"
    )
    parser.addoption(
        "--write-reliability", action="store_true", help="write docs/reliability.md from the tests of faults that ran"
    )
