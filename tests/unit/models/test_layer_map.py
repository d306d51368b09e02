"""Placement of decoder layers, against dealing them out one at a time and megatron's own functions."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from roll_r3.config.pipeline_layout import MAX_LETTERS, MAX_TEXT, parse_pipeline_layout
from roll_r3.config.strategies import MegatronConfig
from roll_r3.models.layer_map import ChunkLayers, chunk_layers


def text_of(sizes: list[int], draw) -> str:
    """Write a layout text for these numbers of decoder layers, with random repetitions and commas."""
    parts = []
    for i, size in enumerate(sizes):
        layers = f"t*{size}" if size and draw(st.booleans()) else "t" * size
        end = "L" if i == len(sizes) - 1 else ""
        comma = "," if draw(st.booleans()) else ""
        parts.append(f"{'E' if i == 0 else ''}{comma}{layers}{end}")
    text = "|".join(parts)
    return text.replace("|t|t|", "(|t)*2|", 1) if draw(st.booleans()) else text


@st.composite
def placements(draw) -> tuple[int, dict[str, object], list[int]]:
    """Draw (number of layers, megatron settings, layers of each chunk in pipeline order)."""
    pp, vpp = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    vpp = 1 if pp == 1 else vpp
    settings_ = {"pipeline_model_parallel_size": pp}
    if vpp > 1:
        settings_["virtual_pipeline_model_parallel_size"] = vpp
    kind = draw(st.sampled_from(["even", "uneven", "layout"])) if pp > 1 else "even"
    if kind == "layout":
        sizes = draw(st.lists(st.integers(0, 4), min_size=pp * vpp, max_size=pp * vpp).filter(sum))
        settings_["pipeline_model_parallel_layout"] = text_of(sizes, draw)
        if draw(st.booleans()):
            settings_.pop("virtual_pipeline_model_parallel_size", None)
        return sum(sizes), settings_, sizes
    slots = [draw(st.integers(1, 4))] * (pp * vpp)
    if kind == "even":
        sizes = list(slots)
        for name, chunk in (("embedding", 0), ("loss", -1)):
            if pp > 1 and draw(st.booleans()):
                settings_[f"account_for_{name}_in_pipeline_split"] = True
                sizes[chunk] -= 1
        assume(sum(sizes))
        return sum(sizes), settings_, sizes
    ends = draw(st.sampled_from([("first",), ("last",), ("first", "last")]))
    assume(not (len(ends) == 2 and pp == 2 and vpp > 1))
    for name in ends:
        own = draw(st.integers(1, 4))
        settings_[f"num_layers_in_{name}_pipeline_stage"] = own * vpp
        for v in range(vpp):
            slots[v * pp + (0 if name == "first" else pp - 1)] = own
    return sum(slots), settings_, slots


def dealt(num_layers: int, stages: int, sizes: list[int]) -> ChunkLayers:
    """Deal the layers out one at a time, each to the first chunk with room."""
    chunks: list[list[int]] = [[] for _ in sizes]
    for layer in range(num_layers):
        here = next(i for i, size in enumerate(sizes) if len(chunks[i]) < size)
        chunks[here].append(layer)
    of_stage: list[list[tuple[int, ...]]] = [[] for _ in range(stages)]
    for i, layers in enumerate(chunks):
        of_stage[i % stages].append(tuple(layers))
    return tuple(map(tuple, of_stage))


@settings(max_examples=2000, deadline=None)
@given(placements())
def test_layers_lie_where_dealing_them_out_puts_them(placement):
    num_layers, megatron, sizes = placement
    config = MegatronConfig(**megatron)
    assert chunk_layers(num_layers, config) == dealt(num_layers, config.pipeline_model_parallel_size, sizes)


def megatron_places(num_layers: int, config: MegatronConfig, parallel_state) -> ChunkLayers | None:
    """Return the placement by megatron's functions; None if they refuse, or do not place every layer exactly once."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    names = (
        "pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "pipeline_model_parallel_layout",
    )
    stages, placed = config.pipeline_model_parallel_size, []
    written, layout = config.virtual_pipeline_model_parallel_size, config.pipeline_model_parallel_layout
    try:
        model = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_dtype="not looked at here",
            # one chunk is the plain schedule; a layout must agree with what is written
            virtual_pipeline_model_parallel_size=None if written == 1 and layout is None else written,
            **{name: getattr(config, name) for name in names},
        )
        chunks = model.virtual_pipeline_model_parallel_size
        parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks)
        for stage in range(stages):
            parallel_state.set_pipeline_model_parallel_rank(stage)  # a layout is asked without pp_rank
            of_stage = []
            for chunk in range(chunks or 1):
                vp_stage = None if chunks is None else chunk
                start = get_transformer_layer_offset(model, vp_stage, stage)
                of_stage.append(tuple(range(start, start + get_num_layers_to_build(model, vp_stage, stage))))
            placed.append(tuple(of_stage))
    except (AssertionError, ValueError, ZeroDivisionError):
        return None
    everywhere = sorted(layer for of_stage in placed for layers in of_stage for layer in layers)
    return tuple(placed) if everywhere == list(range(num_layers)) else None


@pytest.fixture
def parallel_state():
    """Yield megatron's globals, and reset them."""
    from megatron.core import parallel_state

    yield parallel_state
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    parallel_state.set_pipeline_model_parallel_rank(None)


def test_layers_lie_where_megatron_puts_them(parallel_state):
    @settings(max_examples=1000, deadline=None)
    @given(placements())
    def check(placement):
        num_layers, megatron, _ = placement
        config = MegatronConfig(**megatron)
        assert chunk_layers(num_layers, config) == megatron_places(num_layers, config, parallel_state)

    check()


sizes = st.none() | st.integers(1, 6)
layouts = st.none() | st.sampled_from(
    ["Et|tL", "E|tt|ttL", "Ett||t|L", "E(t|)*3,L", "Et*3|t*2|t*2L", "E|t|t|t|t|t|tL|", "EtL"]
)


def test_what_megatron_cannot_place_is_refused_and_nothing_else(parallel_state):
    @settings(max_examples=2000, deadline=None)
    @given(st.integers(1, 16), st.integers(1, 4), st.none() | st.integers(1, 3), sizes, sizes, st.booleans(),
           st.booleans(), layouts)  # fmt: skip
    def check(num_layers, pp, vpp, first, last, embedding, loss, layout):
        assume(not (pp == 1 and first and last))  # megatron counts the one stage twice
        if layout is not None:
            first = last = None
        uneven = bool(first or last)
        config = MegatronConfig(
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=embedding and not uneven and layout is None,
            account_for_loss_in_pipeline_split=loss and not uneven and layout is None,
            pipeline_model_parallel_layout=layout,
        )
        expected = megatron_places(num_layers, config, parallel_state)
        if expected is None:
            with pytest.raises(ValueError, match=r"^[a-z_]+: "):
                chunk_layers(num_layers, config)
        else:
            assert chunk_layers(num_layers, config) == expected

    check()


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et*3|t*2|t*2L", ("Ettt", "tt", "ttL")),
        ("E|tt|ttL", ("E", "tt", "ttL")),
        ("Et,(t|)*3,L", ("Ett", "t", "t", "L")),
        ("E(|tt)*2|L", ("E", "tt", "tt", "L")),
        ("Et||t|L", ("Et", "", "t", "L")),
    ],
)
def test_layout_texts_are_read_as_megatron_reads_them(text, stages):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    megatrons = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_pipeline_layout(text) == stages
    assert tuple("".join(letters[layer] for layer in stage) for stage in megatrons) == stages


@pytest.mark.parametrize("text", ["", "tt|tt", "tE|tL", "Et|t", "Et|EtL", "Et|tL|L", "Et|m|L", "Et |tL", "E((t)*2)*2L"])
def test_a_layout_text_that_megatron_refuses_is_refused(text):
    with pytest.raises(ValueError, match="pipeline_model_parallel_layout"):
        MegatronConfig(pipeline_model_parallel_size=2, pipeline_model_parallel_layout=text)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Et*99999999999L", "stands for more than"),
        (f"Et*{MAX_LETTERS}L", "stands for more than"),
        ("E(t*9)*9999L", "stands for more than"),
        ("Et*(2)*5000L", "stands for more than"),
        ("Et" + "*9" * 2000 + "L", "holds"),
        ("(" * 60_000, "characters long"),
        ("(" * MAX_TEXT, "holds"),
        ("".join(map(chr, range(0x4E00, 0x5C00))), "holds"),
    ],
    ids=["digits", "one too many", "groups", "digits that are made", "stars", "long", "brackets", "letters"],
)
def test_a_layout_text_that_grows_or_is_long_is_refused_before_it_does(text, said):
    with pytest.raises(ValueError, match=said) as refused:
        parse_pipeline_layout(text)
    assert len(str(refused.value)) < 400


def test_a_layout_may_have_as_many_letters_as_are_allowed():
    assert parse_pipeline_layout(f"Et*{MAX_LETTERS - 10}L") == ("E" + "t" * (MAX_LETTERS - 10) + "L",)
