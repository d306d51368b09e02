"""Terms of the memory estimate, against published formulas, megatron's schedules and the loss's allocations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sections import RolloutCorrectionConfig
from roll_r3.models.known import known_config
from roll_r3.models.size import Held, held_parameters, model_size, shape_of
from roll_r3.preflight.plan.activations import LayerCost
from roll_r3.preflight.plan.in_flight import in_flight
from roll_r3.preflight.plan.memory import StageMemory, logit_bytes, stage_memory
from roll_r3.preflight.plan.ranks import Grid
from roll_r3.preflight.plan.step import Passes

QWEN = known_config("Qwen/Qwen3-30B-A3B")


def config(devices: int = 1, *, dtype: str = "bf16", train: dict | None = None, **layout: object) -> RLVRConfig:
    """64 samples of 1,025 tokens."""
    return RLVRConfig(
        exp_name="memory",
        pretrain="Qwen/Qwen3-30B-A3B",
        rollout_batch_size=64,
        num_return_sequences_in_group=1,
        prompt_length=1,
        response_length=1024,
        actor_train={
            "model_args": {"dtype": dtype},
            "device_mapping": list(range(devices)),
            "training_args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
            "strategy_args": {"strategy_config": layout},
            **(train or {}),
        },
        actor_infer={"device_mapping": [devices]},
    )


def stages(run: RLVRConfig, *, entropy_gradient: bool = False) -> list[StageMemory]:
    worker, size = run.actor_train, model_size(QWEN)
    held, passes = held_parameters(size, worker), Passes.of(run, worker)
    loss = {"entropy_gradient": entropy_gradient, "fp32_lm_head": run.fp32_lm_head}
    return [stage_memory(worker, size.shape, held, stage, passes, **loss) for stage in range(len(held))]


def parameters(run: RLVRConfig) -> Held:
    ((held,),) = held_parameters(model_size(QWEN), run.actor_train)
    return held


@pytest.mark.parametrize(("dtype", "weights", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_bytes_of_a_parameter(dtype, weights, state):
    (memory,) = stages(config(dtype=dtype))
    total = model_size(QWEN).total
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights * total, 4 * total, state * total)


def test_the_distributed_optimizer_shares_out_its_state():
    """8 data- and context-parallel ranks, 2 copies of each expert."""
    layout = {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 8}
    sharded = config(16, **layout, use_distributed_optimizer=True)
    held = parameters(sharded)
    assert stages(sharded)[0].optimizer == 12 * (held.dense // 8 + held.experts // 2)
    assert stages(config(16, **layout))[0].optimizer == 12 * (held.dense + held.experts)


def layer_cost(tokens: int = 128, tp: int = 1, **settings_: object) -> LayerCost:
    run = config(tp, tensor_model_parallel_size=tp, **settings_)
    worker = run.actor_train
    dense = replace(
        shape_of(QWEN), moe_layers=frozenset(), heads=16, kv_heads=16, key_dim=128, value_dim=128, qk_norm=False
    )
    return LayerCost(dense, Grid.of(worker), worker.strategy_args.strategy_config, tokens, 2)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_dense_layer_keeps_the_bytes_of_korthikanti(tp):
    """Their 34 sbh of a layer, minus 2 sbh of dropout masks and 19 - 2 - 1 sbh of a 4h network with GeLU.

    Plus 6 sbf of a gated network, and one fp32 number per row and head instead of the scores. All divided by TP.
    """
    cost = layer_cost(tp=tp)
    sb, h, f = 128, cost.shape.hidden, cost.shape.ffn
    published = sb * h * (34 - 2 - 16) + 6 * sb * f + 4 * sb * cost.shape.heads
    assert sum(kept.size for kept in cost.kept(0)) == published // tp


def test_fewer_heads_keep_less_and_norms_of_queries_and_keys_more():
    cost = layer_cost()
    fewer = replace(cost, shape=replace(cost.shape, kv_heads=4))
    normed = replace(fewer, shape=replace(fewer.shape, qk_norm=True))
    sizes = [sum(kept.size for kept in c.kept(0)) for c in (cost, fewer, normed)]
    assert sizes[0] - sizes[1] == 128 * 2 * 12 * 128 * 2  # keys and values of 12 heads
    assert sizes[2] - sizes[1] == 128 * (16 + 4) * 128 * 2


def test_experts_keep_each_token_as_often_as_it_is_routed():
    cost = LayerCost(shape_of(QWEN), Grid.of(config().actor_train), config().actor_train.strategy_args.strategy_config,
                     128, 2)  # fmt: skip
    kept = {k.name: k.size for k in cost.kept(0)}
    assert kept["tokens at their experts"] == 128 * 8 * 2048 * 2
    assert kept["gate and up of the experts"] == 128 * 8 * 2 * 768 * 2
    assert kept["input of the experts' down projection"] == 128 * 8 * 768 * 2
    assert kept["router"] == 128 * 128 * (4 + 4 + 1)


def test_ranks_that_split_an_expert_each_keep_its_tokens():
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    run = config(4, **layout, expert_tensor_parallel_size=2)
    worker = run.actor_train
    cost = LayerCost(shape_of(QWEN), Grid.of(worker), worker.strategy_args.strategy_config, 128, 2)
    kept = {k.name: k.size for k in cost.kept(0)}
    assert kept["tokens at their experts"] == 128 // 2 * 8 * 2 * 2048 * 2
    assert kept["gate and up of the experts"] == 128 // 2 * 8 * 2 * 2 * (768 // 2) * 2


def test_latent_attention_keeps_its_compressed_keys_and_values():
    shape = shape_of(known_config("deepseek-ai/DeepSeek-V3"))
    run = config(2, tensor_model_parallel_size=2)
    cost = LayerCost(shape, Grid.of(run.actor_train), run.actor_train.strategy_args.strategy_config, 128, 2)
    kept = {k.name: k.size for k in cost.kept(0)}
    assert kept["compressed queries, keys and values"] == 64 * (2 * 1536 + 2 * 512 + 64) * 2
    assert kept["queries, keys and values"] == 128 * 64 * (192 + 192 + 128) * 2


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_full_recompute_keeps_inputs_of_groups():
    cost = layer_cost()
    whole = sum(kept.size for kept in cost.kept(0))
    stored = layer_cost().chunk(range(6))
    assert (stored.stored, stored.recomputed) == (6 * whole, 0)
    one = layer_cost(**FULL).chunk(range(6))
    assert (one.stored, one.recomputed) == (6 * 128 * 2048 * 2, whole)
    four = layer_cost(**{**FULL, "recompute_num_layers": 4}).chunk(range(6))
    assert (four.stored, four.recomputed) == (2 * 128 * 2048 * 2, 4 * whole)
    block = layer_cost(**{**FULL, "recompute_method": "block", "recompute_num_layers": 4}).chunk(range(6))
    assert (block.stored, block.recomputed) == (4 * 128 * 2048 * 2 + 2 * whole, whole)
    assert layer_cost(**FULL).chunk(()).stored == 0


@pytest.mark.parametrize(
    ("modules", "spared"),
    [
        (["core_attn"], 4 * 128 * 16),
        (["layernorm"], 2 * 128 * 2048 * 2),
        (["mlp"], 3 * 128 * 6144 * 2),
        (["moe"], 0),
        (["mlp", "core_attn"], 3 * 128 * 6144 * 2 + 4 * 128 * 16),
    ],
)
def test_selective_recompute_spares_its_modules(modules, spared):
    plain = layer_cost()
    whole = sum(kept.size for kept in plain.kept(0))
    found = layer_cost(recompute_granularity="selective", recompute_modules=modules).chunk([0, 1])
    assert (found.stored, found.recomputed) == (2 * (whole - spared), spared)


def test_selective_recompute_of_experts_leaves_their_input():
    run = config(recompute_granularity="selective", recompute_modules=["moe"])
    cost = LayerCost(shape_of(QWEN), Grid.of(run.actor_train), run.actor_train.strategy_args.strategy_config, 128, 2)
    spared = {kept.name for kept in cost.kept(0) if "moe" in kept.recomputed_with}
    assert spared == {
        "router",
        "tokens at their experts",
        "gate and up of the experts",
        "input of the experts' down projection",
    }


def test_the_last_stage_pays_for_the_logits():
    """1,024 inputs, two samples at a time, half on each context-parallel rank; vocabulary over TP 2."""
    layout = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2}
    first, last = stages(config(8, **layout))
    assert first.logits == 0
    assert last.logits == 2 * 1024 // 2 * (151936 // 2) * (2 + 16)
    assert stages(config(8, **layout), entropy_gradient=True)[1].logits == last.logits // 18 * 24
    assert last.no_gradient_pass == last.logits  # infer_batch_size is per_device_train_batch_size
    assert stages(config(8, **layout, train={"infer_batch_size": 8}))[1].no_gradient_pass == 4 * last.logits


def test_an_fp32_head_pays_for_wide_logits_and_a_wide_weight():
    run = config(2, tensor_model_parallel_size=2)
    narrow, wide = (stages(run.model_copy(update={"fp32_lm_head": fp32}))[0] for fp32 in (False, True))
    columns = 151936 // 2
    assert wide.logits == narrow.logits + 2 * 1024 * columns * 2 + columns * 2048 * 4
    assert wide.no_gradient_pass == wide.logits
    fp32 = config(2, dtype="fp32", tensor_model_parallel_size=2)
    assert stages(fp32.model_copy(update={"fp32_lm_head": True})) == stages(fp32)


def test_one_optimizer_step_has_no_pass_before_it():
    once = {"training_args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 32}}
    run = config(1, train=once)
    assert Passes.of(run, run.actor_train).infer is None and stages(run)[0].no_gradient_pass == 0
    weighted = {"rollout_correction": RolloutCorrectionConfig(is_weight="token")}
    for other in (
        {"force_on_policy_ratio": False},
        {"ppo_epochs": 2},
        {"add_token_level_kl": True},
        {"top_entropy_quantile": 0.5},
        weighted,
    ):
        assert Passes.of(run.model_copy(update=other), run.actor_train).infer.number == 32
    bypassed = run.model_copy(update={"ppo_epochs": 2, "rollout_correction": RolloutCorrectionConfig(bypass=True)})
    assert Passes.of(bypassed, run.actor_train).infer is None
    r2 = config(1, train=once | {"router_replay": {"mode": "R2"}})
    assert Passes.of(r2, r2.actor_train).infer.number == 32


def test_the_most_at_once():
    layout = {"pipeline_model_parallel_size": 2, **FULL}
    first, last = stages(config(2, **layout, train={"infer_batch_size": 1}))
    assert 0 < last.recomputed < last.logits and last.no_gradient_pass < last.logits
    for memory in (first, last):
        lasting = memory.weights + memory.gradients + memory.optimizer
        step = memory.activations + max(memory.recomputed, memory.logits)
        assert memory.total == lasting + max(step, memory.no_gradient_pass)
    larger = stages(config(2, **layout, train={"infer_batch_size": 8}))[1]  # eight samples in a pass without gradients
    assert larger.total - last.total == larger.no_gradient_pass - (last.activations + last.logits) > 0
    assert (first.in_flight, last.in_flight) == ((2,), (1,))
    assert first.activations == 2 * 24 * 2 * 1024 * 2048 * 2
    assert last.activations == (24 + 2) * 2 * 1024 * 2048 * 2  # and the inputs of the last norm and the output layer


@pytest.mark.parametrize(
    ("train", "tokens", "number"),
    [
        ({}, 2 * 1024, 8),
        ({"sequence_length_round": 100}, 2 * 1100, 8),
        ({"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 5000}, 5000, 4),
        ({"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 99999}, 16 * 1024, 1),
    ],
)
def test_micro_batches(train, tokens, number):
    run = config(train=train)
    found = Passes.of(run, run.actor_train)
    assert (found.train.tokens, found.train.number, found.train.budgeted) == (tokens, number, number in (1, 4))
    assert found.samples == 64
    assert found.infer.number == 32


def test_the_interleaved_schedule_fills_up_its_micro_batches():
    train = {"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 4000}
    layout = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    run = config(4, train=train, **layout)
    assert Passes.of(run, run.actor_train).train.number == 8  # 6 are needed
    assert stages(run)[0].in_flight == (7, 4)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 5), st.data())
def test_micro_batches_under_way_follow_megatrons_schedule(pp, chunks, rounds, data):
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    micro_batches = rounds * pp if chunks > 1 else data.draw(st.integers(1, 12))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=chunks, max_size=chunks))
    stage = data.draw(st.integers(0, pp - 1))
    parallel_state.set_pipeline_model_parallel_world_size(pp)
    parallel_state.set_pipeline_model_parallel_rank(stage)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
    try:
        total, _, warm_up, remaining = get_pp_rank_microbatches(micro_batches, chunks, pp)
    finally:
        parallel_state.set_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, pp)]
    events = [(chunk, 1) for chunk in order[:warm_up]]
    back = iter([(chunks - 1 - chunk, -1) for chunk in order])
    for chunk in order[warm_up:]:
        events += [(chunk, 1), next(back)]
    assert len(events) == total + remaining
    held, most = [0] * chunks, 0
    for chunk, change in events:
        held[chunk] += change
        most = max(most, sum(n * w for n, w in zip(held, weights, strict=True)))
    found = in_flight(stage, pp, weights, micro_batches)
    assert sum(n * w for n, w in zip(found, weights, strict=True)) == most


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    from roll_r3.platform import megatron_cpu

    megatron_cpu.install()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('s')}/s", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_the_loss_per_logit(dtype, entropy_gradient):
    """Logits are freed after the loss, before its backward, as in the schedule."""
    import torch

    from roll_r3.trainers.megatron.token_values import label_log_probs_and_entropy

    tokens, vocab = 64, 1000
    hidden = torch.randn(1, tokens, 4, dtype=getattr(torch, dtype), requires_grad=True)
    output = torch.randn(4, vocab, dtype=getattr(torch, dtype))
    labels = torch.zeros(1, tokens, dtype=torch.long)

    def loss() -> torch.Tensor:
        logits = hidden @ output
        log_probs, entropy = label_log_probs_and_entropy(
            logits, labels, temperature=0.7, vocab_size=vocab, entropy_gradient=entropy_gradient
        )
        return log_probs.sum() + entropy.sum() if entropy_gradient else log_probs.sum()

    most = most_allocated(lambda: loss().backward())
    assert most / (tokens * vocab) == pytest.approx(
        logit_bytes(hidden.element_size(), entropy_gradient=entropy_gradient), rel=0.01
    )


def most_allocated(run: Callable[[], None]) -> int:
    """Return the maximum bytes allocated at once by operators."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Allocated(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}
            self.most = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.sizes:
                        self.sizes[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, self.sizes.pop, storage._cdata)
            self.most = max(self.most, sum(self.sizes.values()))
            return result

    with Allocated() as allocated:
        run()
    return allocated.most
