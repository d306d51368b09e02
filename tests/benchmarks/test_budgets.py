"""Bounds on the cost of replay, broken by a loss of tenfold, and not by a busy machine.

Each figure is the median of several ratios to a floor, measured in turn with it, in processor time. The bounds are in
examples/benchmarks/budgets.py, the measurements in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from examples.benchmarks import budgets, page, replay_step_time, route_delivery, route_preparation, route_wire
from examples.benchmarks.measuring import Report, facts, machine, ratio
from examples.benchmarks.replay_step_time import RECOMPUTED, TINY
from examples.benchmarks.rollout_routes import Shape
from examples.benchmarks.route_delivery import Split
from examples.benchmarks.route_preparation import MEMORY_FROM, Rank
from examples.benchmarks.route_wire import SPEED_OF
from roll_r3.models.tiny import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
ROUNDS = 5
RANK = Rank(1 << 16, sp=2, stages=2)


@pytest.fixture(scope="module")
def wire() -> Report:
    return route_wire.speeds(facts(SPEED_OF), 1 << 16, stages=2, rounds=ROUNDS)


@pytest.fixture(scope="module")
def answer() -> Report:
    return route_wire.answer_speed(facts(SPEED_OF), rows=1024, rounds=ROUNDS)


@pytest.fixture(scope="module")
def sizes() -> list[Report]:
    return [route_wire.sizes(name) for name in route_wire.MODELS]


@pytest.fixture(scope="module")
def delivery() -> Report:
    split = Split(sp=2, cp=2, stages=2)
    return {
        "model": SPEED_OF,
        "layouts": [route_delivery.handed(SPEED_OF, split, prompts=1, tokens_per_sample=256)],
        "ranks": [{"split": "all", "ranks": 8, **route_delivery.reading(SPEED_OF, split, ROUNDS)}],
        "growth": [{"tokens": 1 << 13, **route_delivery.reading(SPEED_OF, split, ROUNDS, tokens=1 << 13)}],
        "large": {
            "model": SPEED_OF,
            **route_delivery.large(SPEED_OF, Split(sp=2, stages=4, dp=2), prompts=2, tokens_per_sample=2048),
        },
    }


@pytest.fixture(scope="module")
def preparation() -> Report:
    return route_preparation.cost(RANK, ROUNDS)


@pytest.fixture(scope="module")
def memory() -> Report:
    return route_preparation.memory(replace(RANK, tokens=MEMORY_FROM))


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Report:
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return replay_step_time.compare(checkpoint, replace(TINY, samples=8), RECOMPUTED, rounds=ROUNDS)


@pytest.mark.parametrize(
    ("what", "times"), [("encode", budgets.ENCODE), ("decode", budgets.DECODE), ("view", budgets.VIEW)]
)
def test_the_wire_form_over_a_copy(wire: Report, what: str, times: float) -> None:
    assert wire[f"{what}_over_copy"]["median"] < times, wire


def test_an_answer_is_compact_in_a_few_times_what_its_base64_takes(answer: Report) -> None:
    assert answer["compact_over_base64"]["median"] < budgets.COMPACT, answer


def test_the_wire_form_is_its_ids_and_no_more(wire: Report, sizes: list[Report]) -> None:
    assert wire["bytes_over_rows"] < 1.001
    for size in sizes:
        ids = size["moe_layers"] * size["top_k"]
        assert ids <= size["bytes_per_token"] < 1.002 * ids
        # of 4,096 rows a quarter is the prompt, stored once for the group of 8
        assert size["bytes_per_token_of_a_group"] == pytest.approx(ids * (3 / 4 + 1 / 4 / 8), rel=0.002)
    by_model = {size["model"]: size for size in sizes}
    # an id stored in 8 bits needs 7 or 8; log2(128!/120!)/8 = 6.96 bits, log2(256!/248!)/8 = 7.98 bits
    assert by_model["Qwen/Qwen3-30B-A3B"]["over_least_ordered"] == pytest.approx(8 / 6.96, rel=0.002)
    assert by_model["deepseek-ai/DeepSeek-V3"]["over_least_ordered"] == pytest.approx(8 / 7.98, rel=0.002)


def test_a_rank_is_handed_what_it_needs(delivery: Report) -> None:
    [case] = delivery["layouts"]
    assert case["viewed_over_needed"] == case["sent_over_needed"] == 1.0
    assert case["rows_over_all"] == 1.0, "every row to one rank"


def test_reading_takes_a_few_times_what_a_copy_takes(delivery: Report) -> None:
    [case] = delivery["ranks"]
    assert case["view_over_copy"]["median"] < budgets.READ_VIEWS, case
    assert case["send_over_copy"]["median"] < budgets.READ_PARCEL, case


def test_a_rank_of_many_holds_its_rows_and_little_else(delivery: Report) -> None:
    large = delivery["large"]
    assert large["sent_over_needed"] == 1.0
    assert large["peak_over_rows"] < budgets.PEAK_OF_MANY, large


def test_rows_lie_ready_in_a_few_times_what_a_gather_takes(preparation: Report) -> None:
    assert preparation["staged_over_gather"]["median"] < budgets.STAGED, preparation


def test_routers_have_their_indices_in_a_few_times_what_widening_takes(preparation: Report) -> None:
    assert preparation["routed_over_widened"]["median"] < budgets.ROUTED, preparation


@pytest.mark.parametrize("split", ["sp", "cp", "stages"])
def test_preparation_is_no_dearer_on_many_ranks(split: str) -> None:
    cost = route_preparation.cost(replace(Rank(RANK.tokens), **{split: 8}), ROUNDS)
    assert cost["rows_of_the_rank_over_an_even_share"] < 1.01
    assert cost["routed_over_widened"]["median"] < budgets.ROUTED_ON_EIGHT, cost


def test_preparation_grows_with_the_tokens_and_no_faster(preparation: Report) -> None:
    """Use four times the tokens: a quadratic cost would be four times as high over its floor."""
    more = route_preparation.cost(replace(RANK, tokens=4 * RANK.tokens), ROUNDS)
    assert more["routed_over_widened"]["median"] < 2 * preparation["routed_over_widened"]["median"], (preparation, more)


def test_preparation_holds_the_compact_rows_and_little_else(memory: Report) -> None:
    assert 1.0 <= memory["peak_over_rows"] < budgets.PEAK, memory


@pytest.mark.integration
def test_a_step_spends_next_to_nothing_on_routes(step: Report) -> None:
    assert step["share_on_routes"] < budgets.SHARE, step
    assert step["cpu_of_the_fastest"] < budgets.STEP, step
    assert step["rows_as_the_live_router"] > 0.99, "with and without R3 are to do the same work"


@pytest.mark.integration
def test_the_page_has_every_figure(
    wire: Report,
    answer: Report,
    sizes: list[Report],
    delivery: Report,
    preparation: Report,
    memory: Report,
    step: Report,
) -> None:
    text = page.render(
        {
            "route_wire": {"sizes": sizes, "answer": answer, "speeds_of": SPEED_OF, "growth": [wire], "stages": [wire]},
            "route_delivery": delivery,
            "route_preparation": {
                "model": route_preparation.MODEL,
                "growth": [preparation],
                "ranks": {"PP": [preparation]},
                "memory": [memory],
            },
            "replay_step_time": {"machine": machine(), "cases": [step]},
            "rollout_routes": {  # its servers take minutes; only its form is checked
                "shape": asdict(Shape(rounds=1)),
                "bytes_per_sample": {"none": 1, "each": 3, "shared": 2},
                "over": {
                    name: {"tokens_per_s": ratio([1.0], [1.0]), "cpu_us_per_token": ratio([1.0], [1.0])}
                    for name in ("each over none", "shared over none", "shared over each")
                },
                "decoding": {"rows": 1, "megabytes": 1.0, "ms": 1.0, "longest_pause_over_decoding": 0.5},
            },
        }
    )
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 11
    for table in tables:
        assert len({line.count(" | ") for line in table}) == 1, table
    assert sum(len(table) - 2 for table in tables) == 18 + len(sizes)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    committed = (ROOT / page.OUTPUT).read_text()
    assert [heading for heading in headings if heading not in committed] == [], "run make benchmarks ARGS=--write"
