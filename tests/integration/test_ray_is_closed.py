"""Ray is refused if it would listen to other machines."""

from __future__ import annotations

import pytest

from roll_r3.cluster.ray_session import _check_is_closed
from roll_r3.errors import WorkerError


def test_an_address_that_others_reach_is_refused() -> None:
    for address in ("127.0.0.1", "::1"):
        _check_is_closed(address)
    for address in ("192.0.2.2", "0.0.0.0", "::"):
        with pytest.raises(WorkerError, match=f"would listen on {address}"):
            _check_is_closed(address)
