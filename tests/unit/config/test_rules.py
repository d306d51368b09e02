"""Every row of the rule table about fields, with rejected and similar accepted configurations."""

from __future__ import annotations

import pytest

from roll_r3.batch.token_map import Layout
from roll_r3.config.derived import token_alignment
from roll_r3.config.findings.report import render
from roll_r3.config.rules import RULES, check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.tree import overlap
from roll_r3.config.workers import ActorTrainConfig, MegatronTrainStrategy
from tests.unit.config.rule_examples import BATCH, MORE_EXAMPLES, devices, megatron, sglang


def examples(which: int) -> list[tuple[str, list[str]]]:
    """(rule, overrides) of the table's own examples and of the ones above."""
    own = [(rule.id, list((rule.wrong, rule.right)[which])) for rule in RULES]
    return own + [(rule, overrides) for rule, pair in MORE_EXAMPLES.items() for overrides in pair[which]]


def test_every_rule_has_an_id_of_its_own():
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert set(MORE_EXAMPLES) <= set(ids)


def test_the_minimal_configuration_breaks_no_rule(load_text):
    assert check_rules(load_text().config) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_names_every_field_that_its_verdict_depends_on(load_text, rule):
    """Without any field it does not name, its example still violates it."""
    fields = [
        path
        for field in (*rule.fields, *rule.depends)
        for path in (field.format(role="actor_train"), f"actor_train.{field}", f"reference.{field}")
    ]
    for override in rule.wrong:
        if not any(overlap(field, override.partition("=")[0]) for field in fields):
            rest = [other for other in rule.wrong if other != override]
            assert rule.id in {f.rule for f in check_rules(load_text(MINIMAL, *rest).config)}, override


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
    broken = [f.rule for f in found if f.severity != "note" or f.rule == rule]
    assert broken == [], "an accepted example breaks no other rule either"


GPUS = "device_type=cuda"


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [
        ("gpus-not-shared", ["device_type=auto"]),
        ("engine-on-one-node", [GPUS, "actor_infer.device_mapping=range(7, 9)", sglang(tp_size=2)]),
        ("engines-beyond-loopback", [GPUS, "actor_infer.device_mapping=[8]"]),
    ],
)
def test_an_error_that_may_be_none_is_a_warning(load_text, rule, overrides):
    found = {f.rule: f for f in check_rules(load_text(MINIMAL, *overrides).config)}
    assert found[rule].severity == "warning"
    (row,) = (row for row in RULES if row.id == rule)
    assert row.severities == "error or warning"
    refused = {f.rule: f for f in check_rules(load_text(MINIMAL, *row.wrong).config)}
    assert refused[rule].severity == "error", "its own example is an error"


def test_sharing_is_an_error_where_cpu_slots_would_not_do_either(load_text):
    overrides = ["device_type=auto", megatron(moe_grouped_gemm="true")]
    (finding,) = check_rules(load_text(MINIMAL, *overrides).config)
    assert (finding.rule, finding.severity) == ("gpus-not-shared", "error")
    assert check_rules(load_text(MINIMAL, *overrides, "actor_infer.device_mapping=[1]").config) == []


def test_the_rows_that_only_warn_sometimes_are_those_above():
    assert {row.id for row in RULES if row.only_warns is not None} == {
        "gpus-not-shared",
        "engine-on-one-node",
        "engines-beyond-loopback",
    }


RUNS_AS_WRITTEN = {
    "additional-prompts-save-time",
    "shares-give-prompts",
    "batch-std-needs-mean",
    "shift-cancels",
    "scale-cancels",
    "async-save-unread",
    "audit-every-unread",
    "audit-is-the-trainers",
    "audit-needs-replay",
    "checkpoint-directory-unread",
    "checkpoints-kept-unread",
    "correction-filter-bound-unread",
    "devices-unnamed",
    "engine-batch-unread",
    "evaluation-limited-by-vllm",
    "infer-batch-unread",
    "kl-penalty-of-both-signs",
    "kl-weighs-nothing",
    "memory-share-on-cpu",
    "nothing-saved",
    "recompute-method-needs-full",
    "recompute-modules-need-selective",
    "reference-only-infers",
    "reference-runs-no-code",
    "reference-unused",
    "sampling-mask-unread",
    "sample-ratio-clip-is-narrow",
    "sp-needs-tp",
    "token-sum-meets-clipping",
    "truncated-sampling",
    "vpp-of-one",
    "warmup-within-run",
}
"""Rules about files that train as written: costs, and settings without effect."""


def test_what_changes_no_training_is_never_an_error():
    assert {row.id for row in RULES if row.severity == "warning"} == RUNS_AS_WRITTEN


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}])
def test_a_single_chunk_is_the_plain_schedule(load_text, layout):
    overrides = [devices("actor_train", 2), megatron(virtual_pipeline_model_parallel_size=1, **layout)]
    config = load_text(MINIMAL, *overrides).config
    assert [(f.rule, f.severity) for f in check_rules(config)] == [("vpp-of-one", "warning")]
    assert config.actor_train.strategy_args.strategy_config.chunks_per_stage is None


def test_findings_say_where_each_value_came_from(load_text, tmp_path):
    loaded = load_text(MINIMAL, devices("actor_train", 6), megatron(pipeline_model_parallel_size=4))
    (finding,) = (f for f in check_rules(loaded.config) if f.rule == "devices-over-model-parallel")
    assert "6 / 4 ranks of a copy leaves 2" in finding.why
    text = render([finding], loaded.origins)
    assert "device_mapping = [0, 1, 2, 3, 4, 5]  (override actor_train.device_mapping=range(6))" in text
    assert "tensor_model_parallel_size = 1  (default)" in text
    replay = load_text(MINIMAL, "actor_infer.router_replay={}")
    text = render(check_rules(replay.config), replay.origins)
    assert f"actor_train.router_replay.mode = R3  ({tmp_path / 'run.yaml'}:7)" in text


def test_devices_that_do_not_divide_are_not_reported_again_as_samples_that_do_not(load_text):
    config = load_text(MINIMAL, devices("actor_train", 7), megatron(pipeline_model_parallel_size=2)).config
    found = {f.rule for f in check_rules(config)}
    assert found == {"devices-over-model-parallel", "devices-over-expert-parallel"}


def test_warnings_come_after_errors_and_both_are_counted(load_text):
    loaded = load_text(
        MINIMAL, "actor_infer.generating_args={top_p: 0.5, sampling_mask: false}", "dual_clip_loss=1", "rewards={}"
    )
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
