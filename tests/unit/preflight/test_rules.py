"""Rules about more than the YAML, each with a refused and an accepted configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from roll_r3.config.findings.report import Origins
from roll_r3.config.load import load_text
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE, TRAIN
from roll_r3.config.rules.table import Row
from roll_r3.config.tree import overlap
from roll_r3.engines.sglang.version import TESTED
from roll_r3.preflight.check import check_config
from roll_r3.preflight.model_files import Model
from roll_r3.preflight.rules import ALL_RULES, PREFLIGHT_RULES
from roll_r3.preflight.rules.surroundings_rule import ModelRule, Pretend, SurroundingsRule
from roll_r3.preflight.summary import summary
from roll_r3.preflight.surroundings import Surroundings, elsewhere, read_surroundings
from roll_r3.preflight.versions import find_versions
from roll_r3.strategies.base import Capabilities

INSTALLED = {"sglang": str(TESTED), "megatron-core": "0.16.1"}


def configured(*overrides: str) -> RLVRConfig:
    loaded = load_text(MINIMAL, "run.yaml", overrides)
    assert loaded.findings == ()
    return loaded.config


def around(config: RLVRConfig, where: Pretend | None = None) -> Surroundings:
    """Return this machine's facts, with tested engines."""
    here = replace(read_surroundings(config), versions=INSTALLED)
    return here if where is None else where.change(here)


def found(overrides: tuple[str, ...], where: Pretend | None = None) -> list[str]:
    config = configured(*overrides)
    return [finding.rule for finding in check_config(config, around(config, where))]


def where_of(rule: Row, which: str) -> Pretend | None:
    return getattr(rule, f"{which}_where") if isinstance(rule, SurroundingsRule) else None


def test_every_rule_has_an_id_of_its_own():
    ids = [rule.id for rule in ALL_RULES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("rule", PREFLIGHT_RULES, ids=lambda rule: rule.id)
def test_a_rule_refuses(rule):
    assert rule.id in found(rule.wrong, where_of(rule, "wrong"))


@pytest.mark.parametrize("rule", PREFLIGHT_RULES, ids=lambda rule: rule.id)
def test_a_rule_accepts(rule):
    assert found(rule.right, where_of(rule, "right")) == []


@pytest.mark.parametrize("rule", PREFLIGHT_RULES, ids=lambda rule: rule.id)
def test_a_rule_names_every_field_of_its_verdict(rule):
    """Unnamed fields can be removed from an example without effect on the verdict."""
    named = [*rule.fields, *rule.depends]
    if isinstance(rule, ModelRule):  # fields within a role, and the checkpoint that it loads
        named = [*(f"*.{field}" for field in named), "pretrain", "*.model_args"]
    for override in rule.wrong:
        if not any(overlap(field, override.partition("=")[0]) for field in named):
            rest = tuple(other for other in rule.wrong if other != override)
            assert rule.id in found(rest, where_of(rule, "wrong")), override


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.id)
def test_a_rule_has_a_reason_and_a_fix(rule):
    assert rule.why
    assert rule.why[0].islower() or rule.why.split()[0].strip("-").isalnum()
    assert rule.fix
    assert not rule.why.endswith(".")
    assert not rule.fix.endswith(".")


@pytest.mark.parametrize("replay", [(), ("actor_train.router_replay={}", "actor_infer.router_replay={}")])
def test_a_dense_model_is_named_as_such_and_only_once(replay):
    config = configured("pretrain=Qwen/Qwen3-8B", *replay)
    (finding,) = check_config(config, around(config))
    assert (finding.rule, finding.severity) == ("architecture-known", "error")
    assert "Qwen/Qwen3-8B: model_type 'qwen3': Qwen3 is dense" in finding.why
    assert "qwen3_moe" in finding.fix, "names what can be trained"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "qwen3_5_moe", "text_config": {"num_experts": 256}}, "Qwen3.5-MoE puts a text model behind"),
        ({"model_type": "new_omni", "thinker_config": {}}, "'new_omni': it puts a text model behind"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 64}, "ERNIE 4.5 is an MoE family that is not supported yet"),
        ({"model_type": "new_moe", "moe_num_experts": 64}, "'new_moe': it is an MoE family that is not supported yet"),
        ({"model_type": "new", "num_hidden_layers": 4, "hidden_size": 64}, "'new': it is dense"),
        ({"model_type": "new"}, "'new' is not known"),
        ({}, "config.json has no model_type"),
    ],
)
@pytest.mark.parametrize("replay", [(), ("actor_train.router_replay={}", "actor_infer.router_replay={}")])
def test_a_model_that_is_not_trained_is_an_error_with_its_own_reason(tmp_path, raw, said, replay):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = configured(f"pretrain={tmp_path}", *replay)
    (finding,) = check_config(config, around(config))
    assert (finding.rule, finding.severity) == ("architecture-known", "error")
    assert said in finding.why
    assert ("dense" in finding.why) == ("it is dense" in said)


@pytest.mark.parametrize(
    ("name", "rule", "severity"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "architecture-known", "error"),
        ("someone/Qwen2.5-7B-Instruct-mine", "model-unknown-here", "warning"),
        ("/models/Qwen2.5-7B", "model-unknown-here", "warning"),
        ("someone/some-model", "model-unknown-here", "warning"),
    ],
)
def test_a_publishers_name_is_refused_and_a_similar_one_warned_about(name, rule, severity):
    config = configured(f"pretrain={name}")
    (finding,) = check_config(config, elsewhere(config))
    assert (finding.rule, finding.severity) == (rule, severity)
    assert ("Qwen2.5" in name) == ("Qwen2 is dense" in finding.why), "a similar name is mentioned"


@pytest.mark.parametrize(
    ("overrides", "rules"),
    [
        ((f"{TRAIN}.virtual_pipeline_model_parallel_size=2",), {"vpp-needs-pp"}),
        (("actor_infer.router_replay.mode=R2",), {"r2-is-the-trainers"}),
        (("actor_train.max_tokens_per_microbatch_in_train=4",), {"train-budget-given"}),
    ],
)
def test_one_mistake_is_reported_once(overrides, rules):
    assert set(found(overrides)) == rules


def test_a_model_rule_speaks_of_each_role():
    overrides = ("use_kl_loss=true", "actor_train.device_mapping=range(3)", "reference.device_mapping=range(3)")
    split = tuple(
        f"{role}.strategy_args.strategy_config.tensor_model_parallel_size=3" for role in ("actor_train", "reference")
    )
    config = configured(*overrides, *split)
    rules = [f for f in check_config(config, around(config)) if f.rule == "widths-over-tensor-parallel"]
    assert [f.path for f in rules] == [override.partition("=")[0] for override in split]
    assert all(("pretrain", "Qwen/Qwen3-30B-A3B") in f.found for f in rules)
    assert "heads" in rules[0].why


def test_an_unknown_model_gives_one_warning():
    config = configured(
        "pretrain=someone/some-model",
        "actor_train.device_mapping=range(5)",
        f"{TRAIN}.{'pipeline_model_parallel_size'}=5",
    )
    assert [f.rule for f in check_config(config, elsewhere(config))] == ["model-unknown-here"]


def test_elsewhere_looks_at_no_file_and_no_engine(monkeypatch):
    config = configured("actor_train.data_args.file_name=not/here.jsonl", f"{ENGINE}.python=/not/here/python")
    assert check_config(config, elsewhere(config)) == []


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "checkpoint-not-quantized"),
        ({"tie_word_embeddings": True}, "tied-embeddings-need-one-stage"),
        ({"model_type": "made_up"}, "architecture-known"),
        ({"mlp_only_layers": list(range(4))}, "dense-model-with-replay"),
        ({"max_position_embeddings": 2000}, "context-holds-the-longest"),
        ({"num_experts": 15}, "experts-over-expert-parallel"),
        ({"num_hidden_layers": 5}, "layers-over-stages"),
        ({"hidden_size": "wide"}, "sizes-readable"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "widths-over-tensor-parallel"),
    ],
)
def test_a_checkpoint_in_a_directory_is_checked(tmp_path, raw, rule):
    plain = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 260,
        "max_position_embeddings": 4096,
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    }
    overrides = (
        f"pretrain={tmp_path}",
        "actor_train.device_mapping=range(8)",
        f"{TRAIN}.pipeline_model_parallel_size=2",
        f"{TRAIN}.tensor_model_parallel_size=2",
        f"{TRAIN}.expert_model_parallel_size=2",
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert found(overrides) == []
    (tmp_path / "config.json").write_text(json.dumps(plain | raw))
    assert rule in found(overrides)


def test_only_engines_of_the_chosen_strategies_are_looked_for():
    plain = ("actor_train.strategy_args.strategy_name=fsdp2_train", "actor_infer.strategy_args.strategy_name=hf_infer")
    missing = Pretend(versions={"sglang": None, "megatron-core": None})
    assert set(find_versions(configured())) == {"sglang", "megatron-core"}
    assert set(find_versions(configured(plain[1]))) == {"megatron-core"}
    assert find_versions(configured(*plain)) == {}
    assert {"sglang-installed", "megatron-installed"} <= set(found((), missing))
    kl = ("use_kl_loss=true", "reference={}")
    assert set(find_versions(configured(*plain, *kl))) == {"megatron-core"}, "the reference runs Megatron"


def test_rows_about_layouts_and_servers_are_not_about_other_strategies():
    overrides = (
        "actor_train.strategy_args={strategy_name: fsdp2_train, strategy_config: {recompute: true}}",
        "reference.strategy_args={strategy_name: fsdp2_infer}",
        "actor_infer.strategy_args={strategy_name: hf_infer, strategy_config: {dtype: float32}}",
        "use_kl_loss=true",
        *(f"{role}.device_mapping=range(8)" for role in ("actor_train", "actor_infer", "reference")),
        "device_type=cpu",
        "actor_train.use_sequence_packing=true",
    )
    assert found(overrides) == []
    assert found((*overrides, "pretrain=Qwen/Qwen2-57B-A14B")) == []
    assert found((*overrides, "reference.model_args.trust_remote_code=true")) == ["reference-runs-no-code"]
    dense = {name: Capabilities() for name in ("fsdp2_train", "fsdp2_infer", "hf_infer")}
    refused = found((*overrides, "reference.use_sequence_packing=true"), Pretend(capabilities=dense))
    assert refused == ["r3-needs-recording-rollout", "trainer-replays-mode", "packing-supported"]


def test_only_sglang_keeps_tokens_of_its_context_back():
    short = ("prompt_length=8", "response_length=8")
    plain = (*short, "actor_infer.strategy_args.strategy_name=hf_infer")
    assert found(short, Pretend(config_json={"max_position_embeddings": 17})) == ["context-holds-the-longest"]
    assert found(short, Pretend(config_json={"max_position_embeddings": 18})) == []
    assert found(plain, Pretend(config_json={"max_position_embeddings": 15})) == ["context-holds-the-longest"]
    assert found(plain, Pretend(config_json={"max_position_embeddings": 16})) == []


def test_the_summary_of_roles_without_a_layout():
    config = configured(
        "actor_train.strategy_args.strategy_name=fsdp2_train",
        "actor_infer.strategy_args.strategy_name=hf_infer",
        "actor_train.device_mapping=range(4)",
        "actor_infer.device_mapping=range(2)",
    )
    lines = summary(config, Origins("run.yaml"), elsewhere(config)).splitlines()
    assert "  actor_train: fsdp2_train, devices 4, DP 4" in lines
    assert "  actor_infer: hf_infer, devices 2, engines 2" in lines


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((), "algorithm: grpo, ppo"),
        (
            ("pg_variant=cispo", "importance_sampling=seq", "rollout_correction={is_weight: token, opsm_delta: 0.1}"),
            "algorithm: grpo, cispo, one ratio a sample, weights by token, off-policy masking",
        ),
        (("rollout_correction.bypass=true",), "algorithm: grpo, ppo, old policy of the rollout"),
        (
            (
                "filter_groups={enable: true, max_num_gen_batches: 3}",
                "rollout_batch_size=1000",
                "max_additional_running_prompts=4",
                "actor_train.data_args.domain_interleave_probs={a: 0.75, b: 0.25}",
                "rewards={a: {reward: math, weight: 0.1}, b: {reward: code}}",
            ),
            "prompts: shares a 0.75, b 0.25; groups filtered by scores, at most 3,000 sampled for a step; 4 additional",
        ),
        (("rewards={a: {reward: math, weight: 0.1}, b: {reward: code}}",), "rewards: a (math x 0.1), b (code)"),
    ],
)
def test_the_summary_names_the_recipe(overrides, line):
    config = configured(*overrides)
    text = summary(config, Origins("run.yaml"), elsewhere(config))
    assert f"  {line}" in text.splitlines()
    assert ("prompts: " in text) == line.startswith("prompts")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("eval_steps=5",), "at the start, every 5 steps, at the end; 4 samples of each prompt"),
        (("validation.eval_at_start=false",), "at the end; 4 samples of each prompt"),
        (
            ("validation.val_greedy=true", "validation.val_n_sample=1"),
            "at the start, at the end; one greedy sample of each prompt",
        ),
    ],
)
def test_the_summary_says_when_it_evaluates(overrides, line):
    prompts = "validation={data_args: {file_name: 'bundled:copy_digits'}, val_n_sample: 4}"
    config = configured(prompts, *overrides)
    assert f"  evaluation: {line}" in summary(config, Origins("run.yaml"), elsewhere(config)).splitlines()
    assert "evaluation" not in summary(configured(), Origins("run.yaml"), elsewhere(configured()))


def test_responses_of_an_evaluation_must_fit_the_model_too():
    prompts = "validation={data_args: {file_name: 'bundled:copy_digits'}, generating_args: {max_new_tokens: 50000}}"
    config = configured(prompts)
    [finding] = [f for f in check_config(config, around(config)) if f.rule == "context-holds-the-longest"]
    assert ("validation.generating_args.max_new_tokens", 50000) in finding.found


def test_prompts_of_an_evaluation_need_a_rule_for_their_domain(tmp_path):
    (tmp_path / "code.jsonl").write_text('{"prompt": "x", "ground_truth": "y", "tag": "code"}\n')
    config = configured(
        f"validation={{data_args: {{file_name: {tmp_path}/code.jsonl, domain: tag}}}}",
        "rewards={a: {reward: exact_match, tag_included: [default]}}",
    )
    [problem] = read_surroundings(config).evaluation_problems
    assert problem.endswith("code.jsonl has rows of code")
    assert elsewhere(config).evaluation_problems == elsewhere(config).missing_trackers == ()


def test_a_tracker_without_its_library_is_found_on_this_machine(monkeypatch):
    monkeypatch.setattr("roll_r3.preflight.surroundings.release", lambda package: None)
    assert read_surroundings(configured("track_with=[wandb, trackio]")).missing_trackers == ("wandb", "trackio")


def test_models_that_differ_in_their_context_alone_are_the_same_model():
    config = configured("actor_infer.model_args.model_name_or_path=elsewhere/copy")
    raw = dict(around(configured()).models["Qwen/Qwen3-30B-A3B"].raw)
    copies = {"elsewhere/copy": Model.of(raw | {"max_position_embeddings": 262144}, "a test")}
    where = replace(around(config), models={**around(configured()).models, **copies})
    assert "engine-runs-the-same-model" not in [f.rule for f in check_config(config, where)]


def test_checking_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured("output_dir=runs")
    check_config(config, read_surroundings(config))
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_was_not_made_is_an_engine_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configured("actor_infer.strategy_args={strategy_name: vllm}")
    assert find_versions(config)["vllm"] is None
    rules = {finding.rule: finding for finding in check_config(config, read_surroundings(config))}
    assert "make vllm-env" in rules["vllm-installed"].fix
    assert "engine-python-exists" not in rules
    python = "{strategy_name: vllm, strategy_config: {python: no/such/python}}"
    named = configured(f"actor_infer.strategy_args={python}")
    rules = {finding.rule: finding for finding in check_config(named, read_surroundings(named))}
    assert "engine-python-exists" in rules
    assert "vllm-installed" not in rules
