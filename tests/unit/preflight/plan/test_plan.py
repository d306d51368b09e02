"""Plan of a run: ranks and layers as in megatron-core, bytes by hand, and readable text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from roll_r3.batch.routes import RoutedExperts, route_dtype
from roll_r3.config.load import load
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError
from roll_r3.models.architectures.base import MAX_SIZE, RawConfig
from roll_r3.models.known import known_config
from roll_r3.models.size import model_size
from roll_r3.preflight.check import check
from roll_r3.preflight.plan.make import make_plan
from roll_r3.preflight.plan.plan import Plan
from roll_r3.preflight.plan.ranks import Grid
from roll_r3.preflight.plan.text import plan_json, render_plan
from roll_r3.preflight.surroundings import elsewhere

ROOT = Path(__file__).parents[4]
CONFIGS = ROOT / "configs"
V3 = known_config("deepseek-ai/DeepSeek-V3")
TINY = {
    "model_type": "qwen3_moe", "vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 16,
    "num_experts_per_tok": 2, "mlp_only_layers": [0, 5], "max_position_embeddings": 64,
}  # fmt: skip


def config(
    layout: dict[str, object], devices: int, *, engines: int = 4, mode: str = "R3", **other: object
) -> RLVRConfig:
    """128 prompts x 2 samples of 8 + 12 tokens; engines of 2 devices after the trainer's."""
    return RLVRConfig(
        exp_name="plan",
        pretrain="tiny",
        rollout_batch_size=128,
        num_return_sequences_in_group=2,
        prompt_length=8,
        response_length=12,
        actor_train={
            "router_replay": {"mode": mode},
            "device_mapping": list(range(devices)),
            "strategy_args": {"strategy_config": layout},
        },
        actor_infer={
            "device_mapping": list(range(devices, devices + engines)),
            "strategy_args": {"strategy_config": {"tp_size": 2}},
        },
        **other,
    )


def plan(layout: dict[str, object], devices: int, *, per_node: int = 8, **other: object) -> Plan:
    return make_plan(config(layout, devices, **other), models(TINY), devices_per_node=per_node)


def models(raw: RawConfig) -> dict[str, RawConfig]:
    """Return one model for all roles."""
    return dict.fromkeys(("actor_train", "reference"), raw)


POWERS = st.sampled_from([1, 2, 3, 4])


@st.composite
def grids(draw) -> Grid:
    """Draw a valid layout."""
    tp, cp, dp, pp, ep, etp = (draw(POWERS) for _ in range(6))
    assume(tp * cp * dp % (ep * etp) == 0)
    return Grid(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=tp * cp * dp // (ep * etp))


@settings(max_examples=200, deadline=None)
@given(grids())
def test_groups_are_megatrons(grid):
    from megatron.core.parallel_state import RankGenerator

    order, places = "tp-cp-ep-dp-pp", grid.places()
    dense = RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order=order)
    expert = RankGenerator(tp=grid.etp, ep=grid.ep, dp=grid.edp, pp=grid.pp, cp=1, order=order)
    for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("cp", "dp"), ("tp", "cp"), ("tp", "pp")):
        assert [list(group) for group in grid.groups(*axes)] == dense.get_ranks("-".join(axes))
    for axes, token in ((("etp",), "tp"), (("ep",), "ep"), (("edp",), "dp"), (("etp", "ep"), "tp-ep")):
        assert [list(group) for group in grid.groups(*axes)] == expert.get_ranks(token)
    for axis, generator, token in (
        ("tp", dense, "tp"), ("cp", dense, "cp"), ("dp", dense, "dp"), ("pp", dense, "pp"),
        ("etp", expert, "tp"), ("ep", expert, "ep"), ("edp", expert, "dp"), ("pp", expert, "pp"),
    ):  # fmt: skip
        for group in generator.get_ranks(token):
            assert [getattr(places[rank], axis) for rank in group] == list(range(len(group)))


@dataclass
class Pipeline:
    layers: int
    settings: dict[str, object]


@st.composite
def pipelines(draw) -> Pipeline:
    """Draw a model and a split over 2 stages or more."""
    pp, vpp, each = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    found: dict[str, object] = {"pipeline_model_parallel_size": pp}
    if vpp > 1:
        found["virtual_pipeline_model_parallel_size"] = vpp
    layers = pp * vpp * each
    kind = draw(st.sampled_from(["even", "counted", "first"]))
    if kind == "counted" and each > 1:
        found["account_for_loss_in_pipeline_split"] = True
        layers -= 1
    elif kind == "first":
        found["num_layers_in_first_pipeline_stage"] = 2 * vpp * each
        layers += vpp * each
    return Pipeline(layers, found)


def test_layers_are_where_megatron_puts_them():
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    @settings(max_examples=100, deadline=None)
    @given(pipelines(), st.sampled_from([1, 2]))
    def check(pipeline, tp):
        stages = int(pipeline.settings["pipeline_model_parallel_size"])
        layout = {**pipeline.settings, "tensor_model_parallel_size": tp}
        raw = {**TINY, "num_hidden_layers": pipeline.layers}
        (role,) = make_plan(config(layout, stages * tp * 2), models(raw), devices_per_node=8).roles
        model = TransformerConfig(
            num_layers=pipeline.layers, hidden_size=8, num_attention_heads=1, pipeline_dtype="x", **pipeline.settings
        )
        parallel_state.set_virtual_pipeline_model_parallel_world_size(model.virtual_pipeline_model_parallel_size)
        for number, stage in enumerate(role.stages):
            for chunk_number, chunk in enumerate(stage.chunks):
                vp_stage = chunk_number if len(stage.chunks) > 1 else None
                start = get_transformer_layer_offset(model, vp_stage, number)
                built = tuple(range(start, start + get_num_layers_to_build(model, vp_stage, number)))
                assert chunk.layers == built
                assert chunk.moe_layers == tuple(layer for layer in built if layer not in (0, 5))
            assert stage.devices == tuple(range(number * tp * 2, (number + 1) * tp * 2))

    try:
        check()
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


def test_roles_and_their_devices():
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    found = plan(layout, 16, use_kl_loss=True, reference={"device_mapping": [3, 1]})
    trainer, reference = found.roles
    assert (trainer.name, trainer.strategy) == ("actor_train", "megatron_train")
    assert trainer.shards[1] == (2, 3, 10, 11)
    assert trainer.ranks[11].place == trainer.grid.places()[11]
    assert [stage.chunks[0].embedding for stage in trainer.stages] == [True, False]
    assert [stage.chunks[0].output for stage in trainer.stages] == [False, True]
    assert (reference.strategy, reference.devices, reference.shards) == ("megatron_infer", (3, 1), ((3,), (1,)))
    assert reference.stages[0].memory.optimizer == reference.stages[0].memory.gradients == 0
    assert [engine.devices for engine in found.engines] == [(16, 17), (18, 19)]
    assert found.engines[0].weights == model_size(TINY).total  # bf16, over two devices
    (shared,) = found.shared
    assert (shared.roles, shared.devices) == (("actor_train", "reference"), (1, 3))
    assert shared.memory == trainer.stages[0].memory.total + reference.stages[0].memory.total


def test_a_step():
    found = plan({"tensor_model_parallel_size": 2}, 8, ppo_epochs=3)
    assert (found.step.samples, found.step.longest, found.step.tokens) == (256, 20, 5120)
    assert (found.step.samples_per_optimizer_step, found.step.optimizer_steps) == (4, 192)
    assert found.roles[0].passes.samples == 64


def test_prompts_sampled_in_vain_are_planned():
    filtered = {"enable": True, "max_num_gen_batches": 3}
    found = plan({}, 1, filter_groups=filtered, max_additional_running_prompts=16)
    assert (found.step.prompts, found.step.most_prompts) == (128, 400)
    assert "  sampled   up to 400 prompts, of which 128 are kept\n" in render_plan(found)
    unfiltered = plan({}, 1, filter_groups=filtered | {"enable": False})
    assert unfiltered.step.most_prompts == 128
    assert "of which" not in render_plan(unfiltered)


def test_planned_routes_have_the_size_of_recorded_ones():
    found = plan({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 8)
    recorded = RoutedExperts(np.zeros((6, 19, 2), route_dtype(16)))
    assert found.routes.token == recorded.nbytes // 19
    assert found.routes.sample == recorded.nbytes
    assert found.routes.step == 256 * recorded.nbytes
    quarter = 128 * recorded.nbytes // 4  # half of the layers, half of each sequence
    assert found.routes.rank == (quarter, quarter)
    whole = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": False}
    assert plan(whole, 8).routes.rank == (2 * quarter, 2 * quarter)
    split = plan({"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 8)
    assert split.routes.rank == (quarter, quarter)
    many = make_plan(config({}, 1), models({**TINY, "num_experts": 257}), devices_per_node=8)
    assert many.routes.token == 2 * found.routes.token


def test_recorded_routes_stay_with_their_layers():
    found = plan({"pipeline_model_parallel_size": 2}, 4, mode="R2")
    layer = 2 * 19 * 128  # top-k, inputs, samples
    assert found.routes.rank == (3 * layer, 3 * layer)
    uneven = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t*7L"}
    assert plan(uneven, 4, mode="R2").routes.rank == (0, 6 * layer)
    assert (found.routes.node, found.routes.passes) == (0, 0)
    assert plan({}, 4, ppo_epochs=3).routes.passes == 4, "the old log-probabilities, and each epoch"
    off = plan({}, 4, mode="disable").routes
    assert (off.token, off.step, off.rank) == (0, 0, (0,))


def test_bytes_into_a_node_are_those_read_by_its_ranks():
    """32 data-parallel ranks of 8 samples, each on the two devices of a node."""
    found = plan({"tensor_model_parallel_size": 2}, 64, per_node=2)
    assert found.routes.rank == (8 * found.routes.sample // 2,)
    assert found.routes.node == 8 * found.routes.sample
    assert plan({"tensor_model_parallel_size": 2}, 64, per_node=64).routes.node == found.routes.step
    uneven = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t*7L"}
    apart = plan(uneven, 4, per_node=2).routes
    assert apart.rank == (0, 128 * apart.sample)
    assert apart.node == 2 * 128 * apart.sample, "the node of the second stage"


def test_groups_over_several_nodes():
    """TP 2 inside CP 2, expert groups of 8 over two nodes of 4, stages of 8 devices."""
    layout = {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 8,
    }
    found = plan(layout, 16, per_node=4)
    crossing = {group.kind: (len(group.members), group.crossing, group.most_nodes) for group in found.roles[0].groups}
    assert crossing == {"TP": (8, 0, 1), "CP": (8, 0, 1), "EP": (2, 2, 2), "DP x CP": (4, 4, 2), "PP": (8, 8, 2)}
    assert [engine.nodes for engine in found.engines] == [(4,), (4,)]
    split = plan(
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, 4
    )
    assert next(group for group in split.roles[0].groups if group.kind == "EP").members == ((0, 1, 2, 3),)
    assert plan(layout, 16, per_node=3).engines[0].nodes == (5,)
    assert plan(layout, 16, per_node=17).engines[0].nodes == (0, 1)
    assert found.nodes == 5


def test_gradient_groups_are_named_by_their_axes():
    kinds = [g.kind for g in plan({"context_parallel_size": 4}, 4).roles[0].groups]
    assert kinds == ["CP", "DP x CP", "EDP"]
    kinds = [g.kind for g in plan({"expert_model_parallel_size": 2}, 4).roles[0].groups]
    assert kinds == ["EP", "DP", "EDP"]
    assert plan({}, 1).roles[0].groups == ()


def test_a_single_group_is_called_so():
    text = render_plan(plan({"tensor_model_parallel_size": 4}, 4, per_node=2))
    assert "actor_train: TP, one group of 4, on 2 nodes" in text
    assert "all 1 " not in text
    assert "DP" not in text.partition("between nodes")[2]


def test_each_role_is_sized_as_its_own_model():
    """The reference has 94 layers, the trainer 48."""
    run = config({}, 8, use_kl_loss=True, reference={
        "device_mapping": list(range(12, 59)),
        "model_args": {"model_name_or_path": "Qwen/Qwen3-235B-A22B"},
        "strategy_args": {"strategy_config": {"pipeline_model_parallel_size": 47}},
    })  # fmt: skip
    names = {"actor_train": "Qwen/Qwen3-30B-A3B", "reference": "Qwen/Qwen3-235B-A22B"}
    raws = {role: known_config(name) for role, name in names.items()}
    found = make_plan(run, raws, devices_per_node=8)
    trainer, reference = found.roles
    large = model_size(raws["reference"])
    assert (trainer.parameters, reference.parameters) == (model_size(raws["actor_train"]).total, large.total)
    assert [stage.chunks[0].layers for stage in reference.stages][-1] == (92, 93)
    assert sum(stage.memory.weights for stage in reference.stages) == 2 * large.total
    assert found.weight_sync.update == found.engines[0].weights * 2 == 2 * trainer.parameters
    assert "  Qwen/Qwen3-235B-A22B: 235 B parameters" in render_plan(found)


def test_weights_on_their_way():
    sync = plan({"tensor_model_parallel_size": 2}, 8, per_node=8).weight_sync
    assert (sync.update, sync.receivers, sync.from_device) == (2 * model_size(TINY).total, 4, 0)
    assert (sync.bucket, sync.nodes) == (512 << 20, (1,))
    assert plan({}, 8, per_node=16).weight_sync.nodes == ()


def test_weights_that_are_gathered_over_nodes():
    """Each node holds a stage, split over its 8 ranks; the first node receives the stage of the other."""
    layout = {
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 8,
    }
    raw = {**TINY, "num_attention_heads": 8}
    found = make_plan(config(layout, 16), models(raw), devices_per_node=8)
    [chunk] = found.roles[0].stages[1].chunks
    dense, experts = chunk.dense_parameters, chunk.expert_parameters
    into = found.weight_sync.gathered
    assert found.weight_sync.gathered_node == into, "nothing enters another node"
    assert 2 * (dense + 8 * experts) < into < 2 * 8 * (dense + experts), "copies are sent once"
    text = render_plan(found)
    assert "the trainer gathers the model: up to " in text
    inside = make_plan(config(layout, 16), models(raw), devices_per_node=16)
    assert (inside.weight_sync.gathered_node, inside.weight_sync.gathered) == (0, 0)
    assert "the trainer gathers the model inside its node\n" in render_plan(inside)


def test_the_example_of_the_readme_can_be_run(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme.yaml").write_text(text)
    loaded = load(tmp_path / "readme.yaml")
    where = elsewhere(loaded.config)
    assert check(loaded, where) == ()
    found = make_plan(loaded.config, models(where.models[loaded.config.pretrain].raw), devices_per_node=8)
    (trainer,) = found.roles
    assert max(stage.memory.total for stage in trainer.stages) < 80 << 30
    assert max(engine.weights for engine in found.engines) < 0.85 * (80 << 30)
    assert found.step.optimizer_steps <= 16


def test_a_model_that_does_not_split_is_named_with_its_role():
    layout = {"tensor_model_parallel_size": 4}
    with pytest.raises(
        ConfigError, match=r"^actor_train.strategy_args.strategy_config: the width of a dense layer, 126"
    ):
        make_plan(config(layout, 4), models({**TINY, "intermediate_size": 126}), devices_per_node=8)


def test_the_largest_sizes_can_be_planned_and_read():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim")
    raw = {**TINY, **dict.fromkeys((*sizes, "num_attention_heads", "num_key_value_heads"), MAX_SIZE)}
    largest = make_plan(config({}, 4), models({**raw, "num_hidden_layers": 1000}), devices_per_node=8)
    assert " B parameters" in render_plan(largest)
    json.dumps(plan_json(largest), allow_nan=False)
    for name in sizes:
        with pytest.raises(ConfigError, match=f"{name} must be at most [0-9]+, got 10+[.][.][.]"):
            make_plan(config({}, 4), models({**TINY, name: 10**400}), devices_per_node=8)


def test_json_is_plain_and_whole():
    found = plan({"pipeline_model_parallel_size": 2}, 4)
    written = plan_json(found)
    assert json.loads(json.dumps(written)) == written
    stage = written["roles"][0]["stages"][1]
    assert stage["chunks"][0]["layers"] == [4, 5, 6, 7]
    assert stage["memory"]["total"] == found.roles[0].stages[1].memory.total
    assert written["nodes"] == 1
    assert written["memory_figures"] == "computed, not measured"
    assert written["roles"][0]["ranks"][3]["place"]["pp"] == 1


def huge() -> RLVRConfig:
    """DeepSeek-V3 on 512 + 512 devices."""
    layout = {
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 16,
        "expert_model_parallel_size": 32,
        "use_distributed_optimizer": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    role = {"device_mapping": list(range(512)), "infer_batch_size": 1, "use_sequence_packing": True}
    trained = {**layout, "pipeline_model_parallel_layout": "Et|(tt|)*30L"}
    frozen = {name: layout[name] for name in list(layout)[:3]}
    frozen["pipeline_model_parallel_layout"] = "Et*3|(t*4|)*14t*2L"
    return RLVRConfig(
        exp_name="deepseek-v3",
        pretrain="deepseek-ai/DeepSeek-V3",
        rollout_batch_size=128,
        num_return_sequences_in_group=16,
        prompt_length=2048,
        response_length=30720,
        use_kl_loss=True,
        actor_train={
            **role,
            "router_replay": {"mode": "R3"},
            "training_args": {"gradient_accumulation_steps": 64},
            "strategy_args": {"strategy_config": trained},
        },
        reference={**role, "strategy_args": {"strategy_config": frozen}},
        actor_infer={
            "device_mapping": list(range(512, 1024)),
            "strategy_args": {"strategy_config": {"tp_size": 16}},
        },
    )


def test_the_plan_of_a_thousand_devices_fits_a_screen():
    text = render_plan(make_plan(huge(), models(V3), devices_per_node=8))
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    assert lines[0] == "deepseek-v3: 1,024 devices, 128 nodes of 8"
    for said in (
        "671 B parameters, 37.6 B for a token",
        "2,048 samples of 32,768 tokens: 67,108,864 tokens",
        "8 optimizer steps, each on 256 samples",
        "TP 8 PP 16 VPP 2 DP 4; experts EP 32",
        "E 0 | 31-32",
        ".. 11 similar",
        "data-parallel shards: 0 on 0-7, 32-39, .. 480-487 (16 runs)",
        "data-parallel shards: as actor_train",
        "464 B a token (58 layers x 8 experts), 14.5 MiB a sample, 29.0 GiB a step",
        "actor_train: EP, all 16 groups of 32, each on up to 4 nodes",
        "actor_train: TP inside a node",
        "reference: as actor_train",
        "0-511: actor_train, reference, up to ",
        "GiB on each device, computed, not measured; stage ",
    ):
        assert said in text, said


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_can_be_planned_and_read(file):
    example = load(file).config
    raw = known_config(example.pretrain) or (V3 if "DeepSeek" in example.pretrain else TINY)
    lines = render_plan(make_plan(example, models(raw), devices_per_node=8)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 60


def test_the_text_of_a_small_run():
    found = plan({"pipeline_model_parallel_size": 2}, 4, per_node=16, mode="R2")
    text = render_plan(found)
    assert "8 layers, 6 of them MoE: 2 of 16 experts for a token" in text
    assert "each DP rank trains on 1 micro-batch an optimizer step, of up to 19 tokens" in text
    assert "data-parallel shards: 0 on 0, 2; 1 on 1, 3" in text
    (row,) = [line for line in text.splitlines() if line.startswith("  1 ")]
    assert row.split()[:4] == ["1", "2-3", "4-7", "L"]
    assert "4, 6-7" in row
    assert "a trainer's rank keeps 14.2 KiB on its host: its samples, its stage's layers" in text
    assert "nothing but samples" in text
    assert "devices with several roles" not in text
    assert "routes: none are recorded" in render_plan(plan({}, 1, mode="disable"))


def test_the_memory_of_a_role_under_fsdp2_is_not_planned_and_the_plan_says_so():
    base = config({}, 4, mode="R2", use_kl_loss=True, reference={"device_mapping": [0, 1]})
    args = {"strategy_name": "fsdp2_train", "strategy_config": {}}
    plain = base.model_dump() | {"actor_train": base.actor_train.model_dump() | {"strategy_args": args}}
    found = make_plan(RLVRConfig.model_validate(plain), models(TINY), devices_per_node=2)
    role, reference = found.roles
    assert (role.strategy, role.grid.dp, role.stages) == ("fsdp2_train", 4, ())
    assert role.shards == ((0,), (1,), (2,), (3,))
    assert [(g.kind, g.members, g.crossing) for g in role.groups] == [("DP", ((0, 1, 2, 3),), 1)]
    assert reference.stages
    whole = 2 * found.model.parameters
    assert found.weight_sync.gathered_node == whole // 2, "of every weight a node's two ranks hold a half"
    assert found.weight_sync.gathered == whole
    megatron = make_plan(base, models(TINY), devices_per_node=2)
    assert found.routes == megatron.routes, "one stage, whole sequences"
    assert role.passes == megatron.roles[0].passes
    assert [(s.devices, s.memory) for s in found.shared] == [((0, 1), None)]
    text = render_plan(found)
    assert "  DP 4, each rank with its part of every weight; memory is not planned" in text
    assert "  0-1: actor_train, reference, not planned" in text
    assert plan_json(found)["roles"][0]["stages"] == []


def test_an_engine_of_transformers_is_one_device():
    base = config({}, 4)
    args = {"strategy_name": "hf_infer", "strategy_config": {"dtype": "float32", "weight_bucket_mb": 1}}
    plain = base.model_dump() | {"actor_infer": base.actor_infer.model_dump() | {"strategy_args": args}}
    found = make_plan(RLVRConfig.model_validate(plain), models(TINY), devices_per_node=8)
    assert [engine.devices for engine in found.engines] == [(4,), (5,), (6,), (7,)]
    assert {engine.weights for engine in found.engines} == {4 * found.model.parameters}
    assert (found.weight_sync.receivers, found.weight_sync.bucket) == (4, 1 << 20)
