"""Forms of `device_mapping`."""

from __future__ import annotations

import pytest

from roll_r3.config.devices import MAX_DEVICES, MAX_TEXT, parse_devices
from roll_r3.config.rules.example import MINIMAL
from tests.unit.config.conftest import only


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        (3, [3]),
        ("range(4)", [0, 1, 2, 3]),
        ("range(2, 4)", [2, 3]),
        ("range(0,8,3)", [0, 3, 6]),
        ("range(7, 0, -3)", [7, 4, 1]),
        (f"range({MAX_DEVICES})", list(range(MAX_DEVICES))),
        ("list(range(0,2))", [0, 1]),
        ("list( range(0,2) )", [0, 1]),
        ("[5, 7]", [5, 7]),
        ("[5]", [5]),
        ("[ 5 , 7 , ]", [5, 7]),
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
        "[]",
        "[,]",
        "[0,,1]",
        "__import__('os').system('true')",
        "range(2**40)",
        "[i for i in range(3)]",
    ],
)
def test_what_is_refused(written):
    with pytest.raises(ValueError, match=r"device|range"):
        parse_devices(written)


HALF = f"range({MAX_DEVICES // 2})"


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"{HALF} + {HALF} + [0]", "more devices than"),
        (f"range({MAX_DEVICES}) +" * 2000, "more devices than"),
        (f"range({'9' * 50})", "a number of 50 digits"),
        (f"[{'9' * 5000}]", "a number of 5000 digits"),
        (f"range(-{'9' * 17}, {'9' * 17})", "more devices than"),
        ("[1" + " " * 60_000, "is not a device mapping"),
        ("[1," + " " * 60_000 + "x]", "is not a device mapping"),
        ("range(4)" + " " * MAX_TEXT, "characters long"),
    ],
    ids=["sum", "many", "digits", "item", "both ends", "blanks", "blanks inside", "long"],
)
def test_what_names_more_than_a_cluster_is_refused_before_it_is_made(written, said):
    with pytest.raises(ValueError, match=said) as refused:
        parse_devices(written)
    assert len(str(refused.value)) < 300


def test_a_device_has_a_largest_number(load_text):
    largest = MAX_DEVICES - 1
    assert load_text(MINIMAL, f"actor_infer.device_mapping=[{largest}]").config.actor_infer.device_mapping == (largest,)
    assert "must be less than" in only(load_text, MINIMAL, f"actor_infer.device_mapping=[{MAX_DEVICES}]").why
