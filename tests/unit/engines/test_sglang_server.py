"""Command line and environment of the server, and entries refused in `server_args`."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roll_r3.config.engine_role import engine_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.server_args import without_rank
from roll_r3.engines.sglang import launcher
from roll_r3.engines.sglang.server import (
    _RUNNERS_LOSE_ROUTES,
    CPU_PATH,
    RECORDING_RUNNER,
    args_that_lose_routes,
    refused_server_args,
    server_arguments,
    server_command,
    server_environment,
)
from roll_r3.engines.sglang.strategy import SglangRollout
from roll_r3.engines.sglang.version import check_version
from roll_r3.errors import EngineError
from roll_r3.strategies.base import EnginePlace

KEY = "a-very-secret-key"


def arguments(config: SglangConfig, *, device: str = "cpu", record_routes: bool = True, **settings: Any) -> list[str]:
    return server_arguments(
        config,
        model_path="/models/tiny",
        trust_remote_code=False,
        device=device,
        port=1234,
        seed=7,
        context_length=100,
        record_routes=record_routes,
        **{"fp32_lm_head": False, **settings},
    )


def test_the_limit_of_a_set_leaves_room_for_tokens_as_likely_as_the_last() -> None:
    assert "--sampling-mask-max-tokens" not in arguments(SglangConfig(), kept_top_k=2048)
    assert value_of(arguments(SglangConfig(), kept_top_k=5000), "--sampling-mask-max-tokens") == "10000"


def value_of(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def environment(
    config: SglangConfig, inherited: dict[str, str], *, device: str = "cpu", **given: str
) -> dict[str, str]:
    return server_environment(config, inherited, given, device=device, gpu_ids=(2, 5), key=KEY)


def test_the_line_holds_what_the_configuration_says() -> None:
    line = arguments(SglangConfig(max_total_tokens=4096, tp_size=2, chunked_prefill_size=-1))
    assert value_of(line, "--model-path") == "/models/tiny"
    assert value_of(line, "--host") == "127.0.0.1"
    assert value_of(line, "--port") == "1234"
    assert value_of(line, "--tp-size") == "2"
    assert value_of(line, "--max-total-tokens") == "4096"
    assert value_of(line, "--chunked-prefill-size") == "-1"
    assert value_of(line, "--context-length") == "100"
    assert value_of(line, "--random-seed") == "7"
    assert value_of(line, "--weight-version") == "0"
    assert "--enable-return-routed-experts" in line
    assert "--mem-fraction-static" not in line
    assert "--trust-remote-code" not in line


def test_routes_are_recorded_only_when_asked_for() -> None:
    assert "--enable-return-routed-experts" not in arguments(SglangConfig(), record_routes=False)


def test_the_engines_output_head_is_the_runs() -> None:
    assert "--enable-fp32-lm-head" in arguments(SglangConfig(), fp32_lm_head=True)
    assert "--enable-fp32-lm-head" not in arguments(SglangConfig())
    [refusal] = refused_server_args(SglangConfig(server_args={"enable_fp32_lm_head": True}))
    assert "it follows fp32_lm_head" in refusal


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_idle_engine_leaves_its_cores_to_the_trainer(device: str) -> None:
    assert "--sleep-on-idle" in arguments(SglangConfig(), device=device)
    assert "--sleep-on-idle" not in arguments(SglangConfig(server_args={"sleep_on_idle": False}), device=device)


def test_seeds_decide_samples_on_a_cpu() -> None:
    line = arguments(SglangConfig())
    assert "--enable-deterministic-inference" in line
    assert value_of(line, "--attention-backend") == "torch_native"


def test_on_a_cpu_the_cache_does_not_take_the_whole_memory() -> None:
    assert value_of(arguments(SglangConfig()), "--max-total-tokens") == "6400", "64 samples of the context's 100 tokens"
    some = SglangConfig(context_length=200, max_running_requests=8)
    assert value_of(arguments(some), "--max-total-tokens") == "1600"


def test_a_gpu_keeps_sglangs_own_choices() -> None:
    line = arguments(SglangConfig(), device="cuda")
    assert "--max-total-tokens" not in line
    assert not {"--attention-backend", "--sampling-backend", "--enable-deterministic-inference"} & set(line)


def test_server_args_come_last_and_false_is_left_out() -> None:
    config = SglangConfig(
        server_args={"enable_deterministic_inference": False, "disable_radix_cache": True, "schedule_policy": "fcfs"}
    )
    line = arguments(config)
    assert "--enable-deterministic-inference" not in line
    assert "--disable-radix-cache" in line
    assert value_of(line, "--schedule-policy") == "fcfs"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("pp_size", 2, "pipeline"),
        ("enable_hierarchical_cache", True, "host memory"),
        ("disaggregation_mode", "prefill", "decode server"),
        ("speculative_algorithm", "EAGLE", "draft"),
        ("skip_tokenizer_init", True, "another form"),
        ("enable_lmcache", True, "external cache"),
        ("enable_eplb", True, "not verified"),
    ],
)
def test_arguments_that_lose_routes_are_refused(name: str, value: str | int, reason: str) -> None:
    (problem,) = args_that_lose_routes(SglangConfig(server_args={name: value}), record_routes=False)
    assert name in problem
    assert reason in problem


@pytest.mark.parametrize(
    ("runner", "reason"),
    [
        ("auto", "Blackwell"),
        ("flashinfer_trtllm", "itself"),
        ("experimental_sgl_trtllm", "itself"),
        ("flashinfer_mxfp4", "itself"),
        ("triton_kernel", "itself"),
    ],
)
def test_a_runner_whose_kernel_chooses_the_experts_is_refused_where_they_are_recorded(runner: str, reason: str) -> None:
    config = SglangConfig(server_args={"moe_runner_backend": runner})
    (problem,) = args_that_lose_routes(config, record_routes=True)
    assert problem.startswith(f"server_args.moe_runner_backend: {runner}: ")
    assert reason in problem
    assert args_that_lose_routes(config, record_routes=False) == []
    assert refused_server_args(config) == []


@pytest.mark.parametrize(
    ("server_args", "device", "record_routes", "runner"),
    [
        ({}, "cuda", True, "triton"),
        ({"moe_runner_backend": "cutlass"}, "cuda", True, "cutlass"),
        ({}, "cuda", False, None),
        ({}, "cpu", True, None),
    ],
)
def test_on_a_gpu_the_runner_is_one_that_records(
    server_args: dict[str, str], device: str, record_routes: bool, runner: str | None
) -> None:
    line = arguments(SglangConfig(server_args=server_args), device=device, record_routes=record_routes)
    assert ("--moe-runner-backend" in line) == (runner is not None)
    assert runner is None or value_of(line, "--moe-runner-backend") == runner


def test_the_runners_are_sglangs() -> None:
    """Compare with names in the tested release."""
    source = Path(find_spec("sglang").submodule_search_locations[0], "srt/arg_groups/choices.py").read_text()
    values = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign) and _names_runners(node)]
    (choices,) = [ast.literal_eval(value) for value in values]
    assert {RECORDING_RUNNER, *_RUNNERS_LOSE_ROUTES} <= set(choices)


def _names_runners(node: ast.Assign) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == ["MOE_RUNNER_BACKEND_CHOICES"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model_path", "x", "pretrain"),
        ("port", 1, "free one"),
        ("api_key", "k", "fresh one"),
        ("enable_return_routed_experts", False, "router_replay.mode"),
        ("dp_size", 2, "replicas"),
        ("host", "0.0.0.0", "strategy_config.host"),
        ("tp_size", 2, "strategy_config.tp_size"),
        ("max_total_tokens", 2, "strategy_config.max_total_tokens"),
        ("--dtype", "half", "underscores"),
        ("disable-radix-cache", True, "underscores"),
        ("config", "f.yaml", "file"),
        ("quantization", "fp8", "would not fit"),
        ("json_model_override_args", "{}", "trainer's model"),
        ("speculative_algo", "EAGLE", "reads it as speculative_algorithm"),
        ("dp", 2, "reads it as dp_size"),
        ("pp_s", 2, "reads it as pp_size"),
        ("context_len", 2, "reads it as context_length"),
    ],
)
def test_owned_arguments_are_refused(name: str, value: str | int, reason: str) -> None:
    (problem,) = refused_server_args(SglangConfig(server_args={name: value}))
    assert name in problem
    assert reason in problem


def test_every_problem_is_reported_and_harmless_arguments_pass() -> None:
    config = SglangConfig(server_args={"pp_size": 2, "schedule_policy": "fcfs", "port": 1, "nnodes": 2})
    assert len(refused_server_args(config)) == 2
    assert len(args_that_lose_routes(config, record_routes=True)) == 1


def test_the_key_is_in_the_environment_and_not_on_the_line() -> None:
    config = SglangConfig()
    assert not any(KEY in word for word in server_command(config, arguments(config)))
    assert environment(config, {})[launcher.KEY_VARIABLE] == KEY


def test_the_interpreter_is_the_users_choice() -> None:
    assert server_command(SglangConfig(python="/opt/sglang/bin/python"), [])[0] == "/opt/sglang/bin/python"


def test_a_trainers_rank_does_not_leak_into_the_server() -> None:
    inherited = {
        "PATH": "/bin",
        "RANK": "3",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
    }
    variables = environment(SglangConfig(), inherited)
    assert variables["PATH"] == "/bin"
    assert not set(inherited) - {"PATH"} & set(variables)
    assert variables[launcher.PARENT_VARIABLE] == str(os.getpid())


def test_a_variable_that_somebody_wrote_reaches_the_server() -> None:
    given = {"SGLANG_LOG_LEVEL": "debug", "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": "7"}
    variables = environment(SglangConfig(), {"SGLANG_LOG_LEVEL": "info"}, **given)
    assert (variables["SGLANG_LOG_LEVEL"], variables["HF_HUB_OFFLINE"]) == ("debug", "0")
    assert variables["CUDA_VISIBLE_DEVICES"] == "", "set by the start itself"


def test_the_stand_ins_are_for_a_cpu_only() -> None:
    on_cpu, on_gpu = environment(SglangConfig(), {}), environment(SglangConfig(), {}, device="cuda")
    assert on_cpu[launcher.CPU_PATH_VARIABLE] == str(CPU_PATH)
    assert (CPU_PATH / "roll_r3_sglang_cpu.py").is_file()
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert not {launcher.CPU_PATH_VARIABLE, "SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS"} & set(on_gpu)


def test_a_key_does_not_show_in_a_dictionary_of_settings() -> None:
    assert KEY not in f"{ {'api_key': launcher.HiddenKey(KEY)} }"
    assert launcher.HiddenKey(KEY) == KEY


@pytest.mark.parametrize("text", ["0.5.11", "0.5.10.post1", "0.5.7", "0.4.9", "0.5.12rc1"])
def test_releases_before_the_window_are_refused_with_the_reason(text: str) -> None:
    with pytest.raises(EngineError, match=r"too old.*another request.*sglang==0\.5\.23"):
        check_version(text)


def test_releases_inside_the_window_pass_and_newer_ones_warn() -> None:
    assert check_version("0.5.12") is None
    assert check_version("0.5.23") is None
    assert "newer than 0.5.23" in str(check_version("0.5.24"))
    with pytest.raises(EngineError, match="cannot be read"):
        check_version("main")


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "10.1.2.3"), ("127.0.0.1", "127.0.0.1")])
def test_a_server_on_every_address_is_reached_at_its_nodes(tmp_path, host, reached):
    settings = {"strategy_args": {"strategy_config": {"host": host}}}
    config = RLVRConfig(exp_name="x", pretrain="p", actor_train={}, actor_infer=settings)
    engine = SglangRollout(engine_role(config), EnginePlace(0, "cpu", (), tmp_path / "log", "10.1.2.3"))
    engine._client = SimpleNamespace(port=7)
    target = engine.weight_target()
    assert (target.host, target.port, target.api_key) == (reached, 7, engine._key)


def test_the_key_to_ray_does_not_leak_into_the_server() -> None:
    assert without_rank({"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "token", "HOME": "/h"}) == {"HOME": "/h"}


def test_files_of_pickles_are_not_asked_for() -> None:
    assert value_of(arguments(SglangConfig()), "--load-format") == "safetensors"
