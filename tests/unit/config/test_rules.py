"""Every row of the rule table, with a configuration that it refuses and a near one that it accepts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from roll_r3.batch.token_map import Layout
from roll_r3.config.report import render
from roll_r3.config.rules import RULES, check_rules, token_alignment
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.workers import ActorTrainConfig, MegatronTrainStrategy
from roll_r3.strategies.base import Capabilities
from roll_r3.strategies.registry import STRATEGIES
from roll_r3.strategies.rules import CAPABILITY_RULES
from tests.unit.config.conftest import MINIMAL

TRAIN = "actor_train.strategy_args"
ENGINE = "actor_infer.strategy_args"
BATCH = "actor_train.training_args"


def megatron(**settings: object) -> str:
    """The override that gives actor_train this layout."""
    inner = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"{TRAIN}={{strategy_name: megatron_train, strategy_config: {{{inner}}}}}"


def reference(**settings: object) -> str:
    """The override that adds a reference with this layout."""
    return f"reference.strategy_args={megatron(**settings).partition('=')[2].replace('train', 'infer')}"


def sglang(**settings: object) -> str:
    """The override that gives actor_infer these engine settings."""
    return f"{ENGINE}={megatron(**settings).partition('=')[2].replace('megatron_train', 'sglang')}"


def devices(role: str, number: int) -> str:
    return f"{role}.device_mapping=range({number})"


TWO_STAGES = {"pipeline_model_parallel_size": 2}
LAYOUT = {"pipeline_model_parallel_layout": "'Ett|ttL'"}
SHORT = ["prompt_length=8", "response_length=9"]  # 16 inputs


def train_budget(tokens: int | str) -> list[str]:
    return [
        "actor_train.use_dynamic_batching_in_train=true",
        f"actor_train.max_tokens_per_microbatch_in_train={tokens}",
    ]


def infer_budget(role: str, tokens: int | str) -> list[str]:
    return [f"{role}.use_dynamic_batching_in_infer=true", f"{role}.max_tokens_per_microbatch_in_infer={tokens}"]


KL = "use_kl_loss=true"

ALLGATHER = megatron(moe_token_dispatcher_type="allgather", expert_model_parallel_size=2)
REFERENCE_ALLGATHER = [
    devices("reference", 2),
    reference(moe_token_dispatcher_type="allgather", expert_model_parallel_size=2),
    *infer_budget("reference", 4096),
]

Examples = tuple[list[list[str]], list[list[str]]]
EXAMPLES: dict[str, Examples] = {
    "r3-on-both-sides": (
        [["actor_train.router_replay.mode=disable"], ["actor_infer.router_replay.mode=disable"]],
        [["actor_train.router_replay.mode=off", "actor_infer.router_replay.mode=off"]],
    ),
    "r2-is-the-trainers": (
        [["actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=R2"]],
        [["actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=disable"]],
    ),
    "reference-routes-by-itself": (
        [[KL, "reference.router_replay.mode=R3"], [KL, "reference.router_replay.mode=R2"]],
        [[KL, "reference.router_replay.mode=disable"]],
    ),
    "fused-router-skips-replay": (
        [[megatron(moe_router_fusion="true")]],
        [[megatron(moe_router_fusion="true"), "actor_train.router_replay={}", "actor_infer.router_replay={}"]],
    ),
    "no-aux-loss": (
        [[megatron(moe_aux_loss_coeff=0.01)], [KL, reference(moe_aux_loss_coeff=0.01)]],
        [[megatron(moe_aux_loss_coeff=0)]],
    ),
    "reference-bias-is-frozen": (
        [[KL, reference(moe_router_bias_update_rate=0.001)]],
        [[KL, "reference={}", megatron(moe_router_bias_update_rate=0.001)]],
    ),
    "audit-is-the-trainers": (
        [["actor_infer.router_replay.audit=true"], [KL, "reference.router_replay.audit=true"]],
        [["actor_train.router_replay.audit=true"]],
    ),
    "audit-needs-replay": (
        [["actor_train.router_replay={audit: true}", "actor_infer.router_replay={}"]],
        [["actor_train.router_replay={mode: R2, audit: true}", "actor_infer.router_replay={}"]],
    ),
    "audit-reads-the-dispatcher": (
        [["actor_train.router_replay.audit=true", f"{TRAIN}.strategy_config.moe_token_dispatcher_type=flex"]],
        [["actor_train.router_replay.audit=true", f"{TRAIN}.strategy_config.moe_token_dispatcher_type=alltoall"]],
    ),
    "audit-every-unread": (
        [["actor_train.router_replay.audit_every=5"], [KL, "reference.router_replay.audit_every=5"]],
        [
            ["actor_train.router_replay={mode: R3, audit: true, audit_every: 5}"],
            ["actor_train.router_replay.audit_every=10"],
        ],
    ),
    "devices-named": (
        [["actor_train.device_mapping=[]"], ["actor_infer.device_mapping=[]"], [KL, "reference.device_mapping=[]"]],
        [["actor_train.device_mapping=5"]],
    ),
    "devices-once": (
        [["actor_train.device_mapping=[0, 0]"], ["actor_infer.device_mapping=range(2) + range(2)"]],
        [["actor_train.device_mapping=[1, 0]"]],
    ),
    "devices-over-model-parallel": (
        [
            [devices("actor_train", 6), megatron(pipeline_model_parallel_size=2, tensor_model_parallel_size=2)],
            [devices("actor_train", 3), megatron(context_parallel_size=2)],
            [KL, devices("reference", 3), reference(tensor_model_parallel_size=2)],
        ],
        [[devices("actor_train", 8), megatron(pipeline_model_parallel_size=2, tensor_model_parallel_size=2)]],
    ),
    "devices-over-expert-parallel": (
        [
            [devices("actor_train", 4), megatron(expert_model_parallel_size=3)],
            [devices("actor_train", 4), megatron(expert_model_parallel_size=4, pipeline_model_parallel_size=2)],
            [devices("actor_train", 4), megatron(expert_model_parallel_size=2, expert_tensor_parallel_size=4)],
        ],
        [
            [devices("actor_train", 4), megatron(expert_model_parallel_size=2, pipeline_model_parallel_size=2)],
            [devices("actor_train", 4), megatron(expert_model_parallel_size=4, tensor_model_parallel_size=4)],
        ],
    ),
    "experts-split-as-weights": (
        [
            [devices("actor_train", 2), megatron(expert_tensor_parallel_size=2)],
            [devices("actor_train", 2), megatron(expert_tensor_parallel_size=1, tensor_model_parallel_size=2)],
        ],
        [
            [devices("actor_train", 2), megatron(expert_tensor_parallel_size=2, tensor_model_parallel_size=2)],
            [
                devices("actor_train", 2),
                megatron(expert_tensor_parallel_size=1, tensor_model_parallel_size=2, expert_model_parallel_size=2),
            ],
        ],
    ),
    "allgather-needs-one-stage": (
        [[devices("actor_train", 2), megatron(moe_token_dispatcher_type="allgather", pipeline_model_parallel_size=2)]],
        [[devices("actor_train", 2), megatron(moe_token_dispatcher_type="allgather")]],
    ),
    "vpp-needs-pp": (
        [[megatron(virtual_pipeline_model_parallel_size=2)]],
        [
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2),
                f"{BATCH}.gradient_accumulation_steps=2",
            ]
        ],
    ),
    "vpp-of-one": (
        [
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=1, pipeline_model_parallel_size=2),
            ]
        ],
        [[devices("actor_train", 2), megatron(pipeline_model_parallel_size=2)]],
    ),
    "uneven-stages-need-pp": (
        [
            [megatron(num_layers_in_first_pipeline_stage=3)],
            [megatron(num_layers_in_last_pipeline_stage=3)],
            [megatron(account_for_embedding_in_pipeline_split="true")],
            [megatron(account_for_loss_in_pipeline_split="true")],
            [megatron(pipeline_model_parallel_layout="EttL")],
        ],
        [
            [devices("actor_train", 2), megatron(**TWO_STAGES, account_for_loss_in_pipeline_split="true")],
            [
                devices("actor_train", 2),
                megatron(num_layers_in_first_pipeline_stage=3, pipeline_model_parallel_size=2),
            ],
        ],
    ),
    "one-way-to-split-layers": (
        [
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT, num_layers_in_first_pipeline_stage=2)],
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT, num_layers_in_last_pipeline_stage=2)],
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT, account_for_loss_in_pipeline_split="true")],
            [
                devices("actor_train", 2),
                megatron(
                    **TWO_STAGES,
                    num_layers_in_last_pipeline_stage=2,
                    account_for_embedding_in_pipeline_split="true",
                ),
            ],
        ],
        [
            [devices("actor_train", 2), megatron(**TWO_STAGES, **LAYOUT)],
            [
                devices("actor_train", 2),
                megatron(
                    **TWO_STAGES,
                    account_for_embedding_in_pipeline_split="true",
                    account_for_loss_in_pipeline_split="true",
                ),
            ],
        ],
    ),
    "layout-stages-over-pp": (
        [[devices("actor_train", 2), megatron(**TWO_STAGES, pipeline_model_parallel_layout="'Et|t|tL'")]],
        [
            [
                devices("actor_train", 2),
                megatron(**TWO_STAGES, pipeline_model_parallel_layout="'Et|t|t|tL'"),
                f"{BATCH}.gradient_accumulation_steps=2",
            ]
        ],
    ),
    "layout-agrees-with-vpp": (
        [
            [
                devices("actor_train", 2),
                megatron(**TWO_STAGES, **LAYOUT, virtual_pipeline_model_parallel_size=2),
                f"{BATCH}.gradient_accumulation_steps=2",
            ]
        ],
        [
            [
                devices("actor_train", 2),
                megatron(
                    **TWO_STAGES,
                    pipeline_model_parallel_layout="'Et|t|t|tL'",
                    virtual_pipeline_model_parallel_size=2,
                ),
                f"{BATCH}.gradient_accumulation_steps=2",
            ]
        ],
    ),
    "tp-needs-sp": (
        [[devices("actor_train", 2), megatron(tensor_model_parallel_size=2, sequence_parallel="false")]],
        [[devices("actor_train", 2), megatron(tensor_model_parallel_size=2)], [megatron(sequence_parallel="false")]],
    ),
    "sp-needs-tp": (
        [[megatron(sequence_parallel="true")]],
        [[devices("actor_train", 2), megatron(tensor_model_parallel_size=2, sequence_parallel="true")]],
    ),
    "engine-devices-over-tp": (
        [[devices("actor_infer", 3), sglang(tp_size=2)], [sglang(tp_size=2)]],
        [[devices("actor_infer", 4), sglang(tp_size=2)]],
    ),
    "gpus-not-shared": (
        [["device_type=cuda"]],
        [["device_type=cuda", "actor_infer.device_mapping=[1]"], ["device_type=cpu"]],
    ),
    "full-recompute-says-how": (
        [
            [megatron(recompute_granularity="full")],
            [megatron(recompute_granularity="full", recompute_method="block")],
            [megatron(recompute_granularity="full", recompute_num_layers=1)],
        ],
        [[megatron(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)]],
    ),
    "recompute-method-needs-full": (
        [
            [megatron(recompute_method="block")],
            [megatron(recompute_granularity="selective", recompute_modules="[moe]", recompute_num_layers=1)],
        ],
        [[megatron(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)]],
    ),
    "selective-recompute-says-what": (
        [[megatron(recompute_granularity="selective")]],
        [[megatron(recompute_granularity="selective", recompute_modules="[moe]")]],
    ),
    "recompute-modules-need-selective": (
        [
            [megatron(recompute_modules="[moe]")],
            [
                megatron(
                    recompute_granularity="full",
                    recompute_method="block",
                    recompute_num_layers=1,
                    recompute_modules="[moe]",
                )
            ],
        ],
        [[megatron(recompute_granularity="selective", recompute_modules="[moe]")]],
    ),
    "samples-over-ranks": (
        [[devices("actor_train", 3)], [KL, devices("reference", 5)]],
        [[devices("actor_train", 8)], [devices("actor_train", 6), megatron(context_parallel_size=3)]],
    ),
    "samples-over-mini-batches": (
        [
            [f"{BATCH}.gradient_accumulation_steps=3"],
            [f"{BATCH}.per_device_train_batch_size=64", devices("actor_train", 2)],
        ],
        [[f"{BATCH}.gradient_accumulation_steps=4", f"{BATCH}.per_device_train_batch_size=16"]],
    ),
    "interleaved-micro-batches": (
        [
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2),
            ]
        ],
        [
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2),
                f"{BATCH}.gradient_accumulation_steps=4",
            ],
            [devices("actor_train", 2), megatron(pipeline_model_parallel_size=2)],
            [
                devices("actor_train", 2),
                megatron(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=2),
                *train_budget(4096),
            ],
        ],
    ),
    "train-budget-given": (
        [
            ["actor_train.max_tokens_per_microbatch_in_train=4096"],
            ["actor_train.use_dynamic_batching_in_train=true"],
        ],
        [train_budget(4096)],
    ),
    "infer-budget-given": (
        [
            ["actor_train.max_tokens_per_microbatch_in_infer=4096"],
            ["actor_train.use_dynamic_batching_in_infer=true"],
            [KL, "reference.use_dynamic_batching_in_infer=true"],
        ],
        [infer_budget("actor_train", 4096), [KL, *infer_budget("reference", 4096)]],
    ),
    "train-budget-fits-longest": (
        [
            [*SHORT, *train_budget(15)],
            [*SHORT, *train_budget(16), "actor_train.sequence_length_round=3"],
            [*SHORT, *train_budget(16), devices("actor_train", 6), megatron(tensor_model_parallel_size=3)],
            [*SHORT, *train_budget(16), devices("actor_train", 3), megatron(context_parallel_size=3)],
        ],
        [[*SHORT, *train_budget(16)], [*SHORT, *train_budget(18), "actor_train.sequence_length_round=3"]],
    ),
    "infer-budget-fits-longest": (
        [[*SHORT, *infer_budget("actor_train", 15)], [*SHORT, KL, *infer_budget("reference", 15)]],
        [[*SHORT, *infer_budget("actor_train", 16)], [*SHORT, KL, *infer_budget("reference", 16)]],
    ),
    "infer-batch-unread": (
        [
            [*infer_budget("actor_train", 4096), "actor_train.infer_batch_size=4"],
            [KL, *infer_budget("reference", 4096), "reference.infer_batch_size=4"],
        ],
        [["actor_train.infer_batch_size=4", *train_budget(4096)]],
    ),
    "dynamic-batching-with-allgather": (
        [[devices("actor_train", 2), ALLGATHER, *train_budget(4096)], [KL, *REFERENCE_ALLGATHER]],
        [
            [devices("actor_train", 2), ALLGATHER, *train_budget(4096), "actor_train.use_sequence_packing=true"],
            [devices("actor_train", 2), ALLGATHER],
        ],
    ),
    "kl-needs-reference": (
        [[KL], ["add_token_level_kl=true", "init_kl_coef=0.1"]],
        [[KL, "reference={}"], ["add_token_level_kl=true", "init_kl_coef=0.1", "reference={}"]],
    ),
    "reference-unused": ([["reference={}"]], [["reference={}", KL]]),
    "kl-weighs-nothing": (
        [[KL, "reference={}", "kl_loss_coef=0"], ["add_token_level_kl=true", "reference={}"]],
        [[KL, "reference={}"]],
    ),
    "dual-clip-above-one": ([["dual_clip_loss=1"], ["dual_clip_loss=0.5"]], [["dual_clip_loss=3"]]),
    "grpo-needs-groups": (
        [["num_return_sequences_in_group=1"]],
        [["num_return_sequences_in_group=1", "adv_estimator=reinforce"], ["num_return_sequences_in_group=2"]],
    ),
    "response-fits": (
        [["response_length=8", "actor_infer.generating_args.max_new_tokens=9"]],
        [["response_length=8", "actor_infer.generating_args.max_new_tokens=8"]],
    ),
    "engine-context-fits": (
        [["prompt_length=8", "response_length=8", sglang(context_length=15)]],
        [["prompt_length=8", "response_length=8", sglang(context_length=16)]],
    ),
    "engine-cache-fits": (
        [["prompt_length=8", "response_length=8", sglang(max_total_tokens=15)]],
        [["prompt_length=8", "response_length=8", sglang(max_total_tokens=16)]],
    ),
    "top-k-range": (
        [["actor_infer.generating_args.top_k=0"], ["actor_infer.generating_args.top_k=-2"]],
        [["actor_infer.generating_args.top_k=-1"]],
    ),
    "truncated-sampling": (
        [["actor_infer.generating_args.top_k=50"], ["actor_infer.generating_args.top_p=0.9"]],
        [["actor_infer.generating_args.top_p=1"]],
    ),
    "data-named": (
        [
            ["actor_train.data_args={}"],
            ["actor_train.data_args.file_name=''"],
            ["actor_train.data_args.file_name=[a.jsonl, '']"],
        ],
        [["actor_train.data_args.file_name=[a.jsonl]"]],
    ),
    "rewards-named": ([["rewards={}"]], [["rewards={mine: {reward: math}}"]]),
    "reward-known": (
        [["rewards.default.reward=maths"], ["rewards.default.reward='a.b:'"], ["rewards.default.reward=a b:c"]],
        [["rewards.default.reward=my_package.rewards:score"]],
    ),
    "reward-domains-once": (
        [
            ["rewards={a: {reward: math}, b: {reward: math}}"],
            [
                "rewards={a: {reward: math, tag_included: [x]}, b: {reward: math, tag_included: [x]}}",
                "actor_train.data_args.domain=tag",
            ],
        ],
        [
            [
                "rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}",
                "actor_train.data_args.domain=tag",
            ]
        ],
    ),
    "reward-reachable": (
        [["rewards={a: {reward: math, tag_included: [x]}, b: {reward: math}}"]],
        [["rewards={a: {reward: math, tag_included: [default]}}"]],
    ),
    "kl-loss-coef-unread": ([["kl_loss_coef=0.1"]], [["kl_loss_coef=0.1", KL, "reference={}"], ["kl_loss_coef=0.001"]]),
    "init-kl-coef-unread": (
        [["init_kl_coef=0.1"]],
        [["init_kl_coef=0.1", "add_token_level_kl=true", "reference={}"]],
    ),
    "kl-estimator-unread": ([["kl_estimator=k1"]], [["kl_estimator=k1", KL, "reference={}"]]),
    "correction-cap-unread": (
        [["rollout_correction.cap=3"]],
        [["rollout_correction={mode: token_tis, cap: 3}"]],
    ),
    "group-std-unread": (
        [["norm_adv_by_std_in_grpo=false", "adv_estimator=reinforce"]],
        [["norm_adv_by_std_in_grpo=false"]],
    ),
    "prompt-column-unread": (
        [["actor_train.data_args={file_name: a, prompt: q, messages: m}"]],
        [["actor_train.data_args={file_name: a, messages: m}"]],
    ),
    "engine-batch-unread": ([["actor_infer.infer_batch_size=4"]], [["actor_train.infer_batch_size=4"]]),
    "engine-dtype-unread": ([["actor_infer.model_args.dtype=fp32"]], [[sglang(dtype="float32")]]),
    "reference-only-infers": (
        [[KL, reference(use_distributed_optimizer="true")], [KL, reference(overlap_grad_reduce="true")]],
        [[megatron(use_distributed_optimizer="true")], [KL, "reference={}"]],
    ),
    "memory-share-on-cpu": (
        [["device_type=cpu", sglang(mem_fraction_static=0.5)]],
        [["device_type=auto", sglang(mem_fraction_static=0.5)]],
    ),
}


def examples(which: int) -> list[tuple[str, list[str]]]:
    return [(rule, overrides) for rule, pair in EXAMPLES.items() for overrides in pair[which]]


def test_every_rule_has_both_examples():
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert set(EXAMPLES) == set(ids)
    assert all(refused and accepted for refused, accepted in EXAMPLES.values())


def test_the_minimal_configuration_breaks_no_rule(load_text):
    assert check_rules(load_text().config) == []


@pytest.mark.parametrize(("rule", "overrides"), examples(0))
def test_a_rule_refuses(load_text, rule, overrides):
    loaded = load_text(MINIMAL, *overrides)
    found = {f.rule: f for f in check_rules(loaded.config)}
    assert rule in found
    finding = found[rule]
    assert finding.found, "names the fields and their values"
    text = render([finding], loaded.origins)
    assert all(part in text for part in (rule, finding.why, finding.fix, finding.path))


@pytest.mark.parametrize(("rule", "overrides"), examples(1))
def test_a_rule_accepts(load_text, rule, overrides):
    found = check_rules(load_text(MINIMAL, *overrides).config)
    assert [f.rule for f in found] == [], "an accepted example breaks no other rule either"


def test_findings_say_where_each_value_came_from(load_text, tmp_path):
    loaded = load_text(MINIMAL, devices("actor_train", 6), megatron(pipeline_model_parallel_size=4))
    (finding,) = (f for f in check_rules(loaded.config) if f.rule == "devices-over-model-parallel")
    assert "6 / 4 ranks of a copy leaves 2" in finding.why
    text = render([finding], loaded.origins)
    assert "device_mapping = [0, 1, 2, 3, 4, 5]  (override actor_train.device_mapping=range(6))" in text
    assert "tensor_model_parallel_size = 1  (default)" in text
    replay = load_text(MINIMAL, "actor_infer.router_replay={}")
    text = render(check_rules(replay.config), replay.origins)
    assert f"actor_train.router_replay.mode = R3  ({tmp_path / 'run.yaml'}:6)" in text


def test_devices_that_do_not_divide_are_not_reported_again_as_samples_that_do_not(load_text):
    config = load_text(MINIMAL, devices("actor_train", 7), megatron(pipeline_model_parallel_size=2)).config
    found = {f.rule for f in check_rules(config)}
    assert found == {"devices-over-model-parallel", "devices-over-expert-parallel"}


def test_warnings_come_after_errors_and_both_are_counted(load_text):
    loaded = load_text(MINIMAL, "actor_infer.generating_args.top_p=0.5", "dual_clip_loss=1", "rewards={}")
    text = render(check_rules(loaded.config), loaded.origins)
    assert text.index("warning [") > text.rindex("error [")
    assert text.endswith("2 errors and 1 warning")


def test_a_layout_of_a_thousand_devices_is_checked(load_text):
    config = load_text(
        MINIMAL,
        "rollout_batch_size=1024",
        devices("actor_train", 1024),
        megatron(tensor_model_parallel_size=8, pipeline_model_parallel_size=8, expert_model_parallel_size=16),
        f"{BATCH}.gradient_accumulation_steps=16",
    ).config
    assert check_rules(config) == []


CAPABILITIES: dict[str, tuple[str, dict[str, object], list[str]]] = {
    "r3-needs-recording-rollout": ("sglang", {"capabilities": Capabilities()}, []),
    "trainer-replays-mode": ("megatron_train", {"capabilities": Capabilities(replays=frozenset({"R2"}))}, []),
    "packing-supported": (
        "megatron_train",
        {"capabilities": Capabilities(replays=frozenset({"R2", "R3"}))},
        ["actor_train.use_sequence_packing=true"],
    ),
    "strategy-fits-role": ("megatron_train", {"kind": "infer"}, []),
}
"""Rule -> a strategy, how its row of the registry would have to differ, and the overrides that then clash."""


def test_every_capability_rule_has_an_example():
    assert {*CAPABILITIES, "sglang-server-args"} == {rule.id for rule in CAPABILITY_RULES}


def test_server_args_that_lose_routes_are_refused_and_others_pass(load_text):
    passing = load_text(MINIMAL, sglang(server_args="{schedule_policy: fcfs}")).config
    assert check_rules(passing, CAPABILITY_RULES) == []
    violating = load_text(MINIMAL, sglang(server_args="{pp_size: 2, port: 1}")).config
    (finding,) = check_rules(violating, CAPABILITY_RULES)
    assert finding.rule == "sglang-server-args"
    assert "pp_size" in str(finding)
    assert "port" in str(finding)


@pytest.mark.parametrize("rule", CAPABILITIES)
def test_a_capability_rule_refuses_and_accepts(load_text, monkeypatch, rule):
    strategy, difference, overrides = CAPABILITIES[rule]
    config = load_text(MINIMAL, *overrides).config
    assert check_rules(config, CAPABILITY_RULES) == []
    monkeypatch.setitem(STRATEGIES, strategy, replace(STRATEGIES[strategy], **difference))
    (finding,) = check_rules(config, CAPABILITY_RULES)
    assert finding.rule == rule
    assert finding.found


@pytest.mark.parametrize("sp", [None, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 16])
def test_the_alignment_of_the_rules_is_that_of_the_token_map(sp, tp, cp, multiple):
    megatron_config = MegatronConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sp)
    worker = ActorTrainConfig(
        strategy_args=MegatronTrainStrategy(strategy_config=megatron_config), sequence_length_round=multiple
    )
    sp_size = 1 if sp is False else tp
    assert token_alignment(worker) == Layout(cp_size=cp, sp_size=sp_size, multiple=multiple).alignment
