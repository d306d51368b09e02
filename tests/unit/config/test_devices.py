"""`device_mapping` in the ways that users write it."""

from __future__ import annotations

import pytest

from roll_r3.config.devices import MAX_DEVICES, parse_devices


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        (3, [3]),
        ("range(4)", [0, 1, 2, 3]),
        ("range(2, 4)", [2, 3]),
        ("range(0,8,3)", [0, 3, 6]),
        ("list(range(0,2))", [0, 1]),
        ("list( range(0,2) )", [0, 1]),
        ("[5, 7]", [5, 7]),
        ("[5]", [5]),
        ("list(range(0,2)) + [9] + range(4, 5)", [0, 1, 9, 4]),
        ([1, 2], [1, 2]),
        (True, True),
        (None, None),
    ],
)
def test_what_is_understood(written, devices):
    assert parse_devices(written) == devices


@pytest.mark.parametrize(
    "written",
    [
        "",
        "4",
        "range()",
        "range(0, 4, 0)",
        "range(4, 0)",
        f"range({MAX_DEVICES + 1})",
        "list(range(0,8)",
        "[0, 1",
        "__import__('os').system('true')",
        "range(2**40)",
        "[i for i in range(3)]",
    ],
)
def test_what_is_refused(written):
    with pytest.raises(ValueError, match=r"device|range"):
        parse_devices(written)
