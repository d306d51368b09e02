"""Routes spelling (layer, sample, position), checked at their point of use in the real layouts.

The model's attention and experts add nothing (their last projections are zero), so at every layer the hidden state is
still the token's embedding; token ids spell (sample, position). At each router the tests read the token from the hidden
state, and its row from the experts given to the dispatcher. The project's token map and layer map have no part in the
check: a shift of a token or of a layer shows as a wrong code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Gang
from megatron_cases import FULL_RECOMPUTE, INTERLEAVED, Case, make_batch, run_case

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.platform import megatron_cpu
from roll_r3.strategies.base import ProcessInfo

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

EXPERTS, LONGEST = 64, 20
CODES = list(combinations(range(EXPERTS), 2))
"""Sets of two experts; there are more of them than (layer, sample, position) triples."""


@pytest.fixture(scope="session")
def silent_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models adding nothing to the embedding, named by their dense layers."""
    from safetensors.torch import load_file, save_file

    found = {}
    for name, dense in {"all MoE": [], "dense first": [0, 1], "interleaved": [1, 3]}.items():
        path = make_tiny_checkpoint(tmp_path_factory.mktemp("silent"), num_experts=EXPERTS, mlp_only_layers=dense)
        file = path / "model.safetensors"
        weights = load_file(file)
        for parameter, tensor in weights.items():
            if parameter.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        save_file(weights, file, metadata={"format": "pt"})
        found[name] = path
    return found


def coded_batch(checkpoint: Path) -> Batch:
    """Return a batch with places encoded in its token ids and routes."""
    batch = make_batch()
    moe_layers = read_facts(checkpoint).moe_layers
    ids, routes = [], []
    for sample, length in enumerate(batch.lengths_n):
        ids.append(1 + sample * LONGEST + np.arange(length))
        codes = [[CODES[code_of(layer, sample, p)] for p in range(length)] for layer in moe_layers]
        routes.append(RoutedExperts(np.array(codes, np.uint8)))
    return replace(batch, input_ids_N=np.concatenate(ids), routes=tuple(routes))


def code_of(layer: int, sample: int, position: int) -> int:
    return (layer * 8 + sample) * LONGEST + position


@dataclass
class Seen:
    """Observations at one rank's routers in a training step."""

    calls: dict[int, int]
    """Layer -> number of forward and recompute calls."""
    rows: int
    """Number of rows of real tokens."""
    wrong: list[str]
    tokens: set[tuple[int, int, int]]
    """Observed (layer, sample, position) triples."""
    outside: int = 0
    """Calls of routers outside the decoder."""


def watch(process: ProcessInfo, case: Case, batch: Batch, change: str | None = None) -> Seen:
    """Run a step with every router watched."""
    import torch

    megatron_cpu.install()
    from megatron.core.transformer.moe.router import TopKRouter
    from safetensors.torch import load_file

    embedding = load_file(Path(case.checkpoint) / "model.safetensors")["model.embed_tokens.weight"]
    directions = torch.nn.functional.normalize(embedding, dim=-1)
    seen = Seen({}, 0, [], set())
    original = TopKRouter.forward

    def forward(router: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = original(router, hidden, *args, **kwargs)
        if getattr(router, "predicts_further_tokens", False):
            assert router.router_replay is None
            seen.outside += 1
            return probs, routing_map
        layer = router.layer_number - 1
        seen.calls[layer] = seen.calls.get(layer, 0) + 1
        flat = torch.nn.functional.normalize(hidden.detach().reshape(-1, hidden.shape[-1]), dim=-1)
        for token, chosen in zip((flat @ directions.T).argmax(-1).tolist(), routing_map, strict=True):
            experts = tuple(chosen.nonzero()[:, 0].tolist())
            if token == 0:  # padding
                if len(experts) != 2:
                    seen.wrong.append(f"padding in layer {layer} has experts {experts}")
                continue
            sample, position = divmod(token - 1, LONGEST)
            seen.rows += 1
            seen.tokens.add((layer, sample, position))
            if experts != CODES[code_of(layer, sample, position)]:
                seen.wrong.append(f"layer {layer}, sample {sample}, position {position}: experts {experts}")
        return probs, routing_map

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKRouter, "forward", forward)
        if change:
            CHANGES[change](patch, len(read_facts(case.checkpoint).moe_layers))
        run_case(process, case, batch)
    return seen


LAYOUTS: dict[str, tuple[int, str, dict[str, Any], bool]] = {
    "one process": (1, "interleaved", FULL_RECOMPUTE, False),
    "one process packed": (1, "all MoE", {}, True),
    "TP2": (2, "all MoE", {"tensor_model_parallel_size": 2, **FULL_RECOMPUTE}, False),
    "TP2 packed": (2, "interleaved", {"tensor_model_parallel_size": 2}, True),
    "CP2": (2, "all MoE", {"context_parallel_size": 2}, False),
    "CP2 packed": (2, "dense first", {"context_parallel_size": 2, **FULL_RECOMPUTE}, True),
    "EP2": (2, "all MoE", {"expert_model_parallel_size": 2}, False),
    "EP2 allgather": (2, "all MoE", {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}, True),
    "PP2": (2, "dense first", {"pipeline_model_parallel_size": 2, **FULL_RECOMPUTE}, False),
    "PP2 VPP2": (2, "interleaved", {**INTERLEAVED, **FULL_RECOMPUTE}, True),
    "PP2 VPP2 dense first": (2, "dense first", {**INTERLEAVED, **FULL_RECOMPUTE}, False),
    "PP2 uneven": (
        2,
        "interleaved",
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 3,
        },
        False,
    ),
    "TP2 PP2": (4, "interleaved", {"tensor_model_parallel_size": 2, **INTERLEAVED, **FULL_RECOMPUTE}, True),
    "TP2 CP2": (4, "all MoE", {"tensor_model_parallel_size": 2, "context_parallel_size": 2}, True),
    "CP2 PP2 EP2": (
        4,
        "dense first",
        {"context_parallel_size": 2, **INTERLEAVED, "expert_model_parallel_size": 2},
        False,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_router_gets_the_row_of_its_layer_and_token(
    name: str, gang: Gangs, silent_models: dict[str, Path]
) -> None:
    size, model, layout, packed = LAYOUTS[name]
    checkpoint = silent_models[model]
    batch = coded_batch(checkpoint)
    case = Case(str(checkpoint), layout, packed=packed, log_probs_first=True)

    seen = gang(size).run(watch, case, batch)

    assert [text for rank in seen for text in rank.wrong] == []
    tokens = set().union(*(rank.tokens for rank in seen))
    moe_layers = read_facts(checkpoint).moe_layers
    assert tokens == {(m, s, p) for m in moe_layers for s, n in enumerate(batch.lengths_n) for p in range(n)}
    # the log-prob pass, the training pass, and recomputation once more; sequence-parallel ranks see parts
    passes = 3 if "recompute_granularity" in layout else 2
    assert sum(rank.rows for rank in seen) >= passes * int(batch.lengths_n.sum()) * len(moe_layers)


def _prediction_layers(patch: pytest.MonkeyPatch, layers: int) -> None:
    """Add a multi-token-prediction block behind the decoder."""
    from mbridge.core import llm_bridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.moe.router import TopKRouter

    from roll_r3.trainers.megatron import bridge
    from roll_r3.trainers.megatron.spec import LocalNorm

    gpt_model = llm_bridge.GPTModel

    def build(config: Any, transformer_layer_spec: Any, **kwargs: Any) -> Any:
        config.mtp_num_layers = 1
        spec = get_gpt_mtp_block_spec(config, transformer_layer_spec, use_transformer_engine=False)
        for norm in ("enorm", "hnorm", "layer_norm"):
            setattr(spec.layer_specs[0].submodules, norm, LocalNorm)
        model = gpt_model(config=config, transformer_layer_spec=transformer_layer_spec, mtp_block_spec=spec, **kwargs)
        config.mtp_num_layers = None  # its loss needs labels
        run = model.mtp.forward

        def forward(hidden_states: Any, **kwargs: Any) -> Any:
            run(hidden_states=hidden_states, **kwargs)
            return hidden_states

        model.mtp.forward = forward
        routers = [module for module in model.mtp.modules() if isinstance(module, TopKRouter)]
        assert len(routers) == 1
        for router in routers:
            router.set_layer_number(1)  # the worst case: some versions count these layers from 1 again
            router.predicts_further_tokens = True
        return model

    init = bridge.PlainNames.__init__

    def without_the_block(self: Any, chunk: Any) -> None:
        init(self, chunk)
        self._parameters = [(name, value) for name, value in self._parameters if not name.startswith("mtp")]
        self._state = {name: value for name, value in self._state.items() if not name.startswith("mtp")}

    patch.setattr(llm_bridge, "GPTModel", build)
    patch.setattr(bridge.PlainNames, "__init__", without_the_block)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_predict_further_tokens_route_by_themselves(
    size: int, gang: Gangs, silent_models: dict[str, Path]
) -> None:
    checkpoint = silent_models["dense first"]
    case = Case(str(checkpoint), {"tensor_model_parallel_size": size})
    seen = gang(size).run(watch, case, coded_batch(checkpoint), "prediction layers")
    assert all(rank.outside > 0 and rank.rows > 0 for rank in seen)
    assert [text for rank in seen for text in rank.wrong] == []


# Negative controls: each mistake must show


def _rows_shifted(patch: pytest.MonkeyPatch, layers: int) -> None:
    _rolled(patch, axis=1)


def _layers_shifted(patch: pytest.MonkeyPatch, layers: int) -> None:
    _rolled(patch, axis=0)


def _rolled(patch: pytest.MonkeyPatch, axis: int) -> None:
    from roll_r3.replay.session import ReplaySession

    right = ReplaySession._laid_out

    def wrong(*args: Any) -> Any:
        ids_LtK, known_t = right(*args)
        return ids_LtK.roll(1, axis), known_t

    patch.setattr(ReplaySession, "_laid_out", wrong)


def _cp_order_not_applied(patch: pytest.MonkeyPatch, layers: int) -> None:
    """Give each rank one run of rows, while attention holds two pieces."""
    _routes_laid_out(patch, lambda layout: replace(layout, cp_size=1, cp_rank=0, sp_size=2, sp_rank=layout.cp_rank))


def _sp_slice_of_the_wrong_rank(patch: pytest.MonkeyPatch, layers: int) -> None:
    _routes_laid_out(patch, lambda layout: replace(layout, sp_rank=layout.sp_size - 1 - layout.sp_rank))


def _routes_laid_out(patch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]) -> None:
    """Routers' rows by another layout than the tokens'."""
    from roll_r3.trainers import cutting

    build = cutting.build_token_map

    def mixed(lengths: Any, layout: Any, **kwargs: Any) -> Any:
        right = build(lengths, layout, **kwargs)
        width = right.slots_BS.shape[1] * layout.cp_size
        other = build(lengths, wrong(layout), pad_to=width)
        return replace(right, router_slots_t=other.router_slots_t)

    patch.setattr(cutting, "build_token_map", mixed)


def _counted_layers_of_a_chunk(patch: pytest.MonkeyPatch, layers: int) -> None:
    """Layers by their count in the model, as if its first were not dense."""
    from roll_r3.replay import session

    right = session.chunk_rows

    def wrong(*args: Any) -> list[range]:
        firsts = [(min(rows.start + 1, layers - len(rows)), len(rows)) for rows in right(*args)]
        return [range(first, first + size) for first, size in firsts]

    patch.setattr(session, "chunk_rows", wrong)


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "prediction layers": _prediction_layers,
    "rows shifted by one": _rows_shifted,
    "layers shifted by one": _layers_shifted,
    "CP order not applied": _cp_order_not_applied,
    "SP slice of the wrong rank": _sp_slice_of_the_wrong_rank,
    "dense layers not skipped": _counted_layers_of_a_chunk,
}


@pytest.mark.parametrize(
    ("mistake", "layout_name"),
    [
        ("rows shifted by one", "one process"),
        ("rows shifted by one", "PP2 VPP2"),
        ("layers shifted by one", "one process packed"),
        ("layers shifted by one", "PP2"),
        ("CP order not applied", "CP2"),
        ("SP slice of the wrong rank", "TP2"),
        ("SP slice of the wrong rank", "TP2 packed"),
        ("dense layers not skipped", "PP2 VPP2 dense first"),
    ],
)
def test_a_mistake_shows(mistake: str, layout_name: str, gang: Gangs, silent_models: dict[str, Path]) -> None:
    size, model, layout, packed = LAYOUTS[layout_name]
    checkpoint = silent_models[model]
    case = Case(str(checkpoint), layout, packed=packed)
    seen = gang(size).run(watch, case, coded_batch(checkpoint), mistake)
    wrong = [text for rank in seen for text in rank.wrong]
    print(f"{mistake}: {len(wrong)} of {sum(rank.rows for rank in seen)} rows wrong, such as {wrong[:1]}")
    assert len(wrong) > 0.1 * sum(rank.rows for rank in seen)
