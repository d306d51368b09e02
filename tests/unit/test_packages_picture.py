"""docs/packages.py draws the packages from their imports."""

from __future__ import annotations

import pytest

from docs.packages import BEGIN, END, House, draw, read_house, reduced, render_page

PICTURE = """\
```mermaid
flowchart TD
    main["main<br/>3 lines"]
    middle["middle<br/>2 lines"]
    bottom["bottom<br/>1 lines"]
    main --> middle
    middle --> bottom
```
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    files = {
        "__init__": "",
        "main": "from tiny_house.middle import inner\nfrom tiny_house import bottom\nimport json\n",
        "middle/__init__": "",
        "middle/inner": "from tiny_house.middle import other\n",
        "middle/other": "import tiny_house.bottom.thing\n",
        "bottom/__init__": "",
        "bottom/thing": "X = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / "tiny_house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return read_house("tiny_house", tmp_path / "tiny_house")


def test_imports_and_lines_are_read(tiny):
    assert tiny.imports == {"main": {"middle", "bottom"}, "middle": {"bottom"}, "bottom": set()}
    assert tiny.lines == {"main": 3, "middle": 2, "bottom": 1}


def test_the_page_keeps_its_text_and_gets_the_picture(tiny):
    page = render_page(f"before\n{BEGIN}old\n{END}after\n", tiny)
    assert page == f"before\n{BEGIN}{PICTURE}{END}after\n"
    assert render_page(page, tiny) == page
    with pytest.raises(ValueError, match="must have the lines"):
        render_page("no comments\n", tiny)


def test_a_new_import_changes_the_picture(tiny):
    page = render_page(f"{BEGIN}{END}", tiny)
    grown = House({**tiny.imports, "bottom": frozenset({"base"}), "base": frozenset()}, {**tiny.lines, "base": 5})
    assert "    bottom --> base\n" in render_page(page, grown)


def test_lines_are_rounded_and_keep_a_figure_that_is_close():
    house = House({"a": frozenset()}, {"a": 1_234})
    assert "1,200 lines" in draw(house, {})
    assert "1,150 lines" in draw(house, {"a": 1_150})
    assert "1,200 lines" in draw(house, {"a": 900})


def test_packages_in_a_circle_are_named():
    with pytest.raises(ValueError, match=r"in a circle: a, b$"):
        reduced({"a": frozenset("b"), "b": frozenset("a"), "c": frozenset("a")})
