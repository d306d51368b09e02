"""Command line and environment of the server, releases, and entries refused in `server_args`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

import pytest

from roll_r3.config.sampling_settings import Sampling
from roll_r3.config.strategies import VllmConfig
from roll_r3.engines.vllm import launcher
from roll_r3.engines.vllm.server import (
    CPU_PATH,
    PLUGIN_PATH,
    args_that_lose_routes,
    cache_bytes,
    cpu_lacks_a_kernel,
    refused_server_args,
    server_arguments,
    server_command,
    server_environment,
    settings_left_out,
)
from roll_r3.engines.vllm.version import check_version
from roll_r3.errors import EngineError
from roll_r3.models.size import shape_of

KEY = "a-very-secret-key"
QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def arguments(config: VllmConfig, *, device: str = "cpu", record_routes: bool = True, **sampling: Any):
    return server_arguments(
        config,
        model_path="/models/tiny",
        trust_remote_code=False,
        device=device,
        port=1234,
        seed=7,
        sampling=Sampling(max_new_tokens=8, **sampling),
        context_length=100,
        record_routes=record_routes,
        shape=shape_of(QWEN),
    )


def value_of(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def environment(config: VllmConfig, inherited: dict[str, str], *, device: str = "cpu", **given: str) -> dict[str, str]:
    return server_environment(config, inherited, given, device=device, gpu_ids=(2, 5), key=KEY)


def test_the_line_holds_what_the_configuration_says():
    line = arguments(VllmConfig(tp_size=2, max_running_requests=9, gpu_memory_utilization=0.5), device="cuda")
    expected = {
        "--model": "/models/tiny",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--dtype": "bfloat16",
        "--tensor-parallel-size": "2",
        "--max-num-seqs": "9",
        "--max-model-len": "100",
        "--seed": "7",
        "--gpu-memory-utilization": "0.5",
    }
    assert {flag: value_of(line, flag) for flag in expected} == expected
    assert {"--enable-return-routed-experts", "--enable-scale-out"} <= set(line)
    assert json.loads(value_of(line, "--weight-transfer-config")) == {"backend": "roll_r3"}
    assert not {"--trust-remote-code", "--enforce-eager", "--block-size", "--kv-cache-memory-bytes"} & set(line)


def test_routes_are_recorded_only_when_asked_for():
    assert "--enable-return-routed-experts" not in arguments(VllmConfig(), record_routes=False)


@pytest.mark.parametrize(
    ("sampling", "mode", "returns_kept"),
    [
        ({}, "raw_logprobs", False),
        ({"temperature": 0.8}, "processed_logprobs", False),
        ({"top_p": 0.9}, "processed_logprobs", False),
        ({"top_k": 9, "return_kept": True}, "processed_logprobs", True),
    ],
)
def test_log_probs_are_of_the_distribution_that_is_sampled(sampling, mode, returns_kept):
    line = arguments(VllmConfig(), **sampling)
    assert value_of(line, "--logprobs-mode") == mode
    assert ("--return-sampling-mask" in line) == returns_kept


def test_a_cpu_gets_a_cache_for_what_it_decodes_at_once_and_no_more():
    token = 4 * 2 * (32 + 32) * 2  # layers x key-value heads x (key + value) x bytes
    line = arguments(VllmConfig(max_running_requests=8))
    assert int(value_of(line, "--kv-cache-memory-bytes")) == (25 + 1) * 32 * token  # 8 x 100 tokens in blocks of 32
    assert value_of(line, "--block-size") == "32"
    assert value_of(arguments(VllmConfig()), "--max-num-seqs") == "64"
    own = arguments(VllmConfig(max_total_tokens=100), device="cuda")
    assert int(value_of(own, "--kv-cache-memory-bytes")) == (4 + 1) * 32 * token


def test_the_cache_is_split_over_ranks_as_far_as_there_are_heads():
    shape = shape_of(QWEN)
    one = cache_bytes(VllmConfig(), shape, 64, 32)
    assert cache_bytes(VllmConfig(tp_size=2), shape, 64, 32) == one // 2
    assert cache_bytes(VllmConfig(tp_size=4), shape, 64, 32) == one // 2
    assert cache_bytes(VllmConfig(dtype="float32"), shape, 64, 32) == 2 * one


@pytest.mark.parametrize(("size", "lacks"), [(32, ""), (128, ""), (16, "model's 16"), (33, "model's 33")])
def test_a_cpu_has_kernels_for_some_heads(size, lacks):
    found = cpu_lacks_a_kernel(shape_of({**QWEN, "head_dim": size}))
    assert lacks in found
    assert bool(lacks) == bool(found)


def test_server_args_come_last_and_false_is_said():
    line = arguments(VllmConfig(server_args={"async_scheduling": False, "disable_log_stats": True, "max_logprob": 3}))
    assert line[-4:] == ["--no-async-scheduling", "--disable-log-stats", "--max-logprob", "3"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("pipeline_parallel_size", 2, "pipeline"),
        ("enable_prefix_caching", False, "prefix cache"),
        ("speculative_config", "{}", "draft"),
        ("decode_context_parallel_size", 2, "context-parallel"),
        ("prefill_context_parallel_size", 2, "context-parallel"),
        ("kv_transfer_config", "{}", "from elsewhere"),
        ("enable_eplb", True, "not verified"),
        ("worker_cls", "x.Y", "own classes"),
        ("worker_extension_cls", "x.Y", "own classes"),
        ("scheduler_cls", "x.Y", "own classes"),
        ("model_impl", "transformers", "own classes"),
        ("model_class_overrides", "{}", "own classes"),
    ],
)
def test_arguments_that_lose_routes_are_refused(name, value, reason):
    config = VllmConfig(server_args={name: value})
    (problem,) = args_that_lose_routes(config)
    assert name in problem
    assert reason in problem
    assert refused_server_args(config) == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model", "x", "pretrain"),
        ("port", 1, "free one"),
        ("api_key", "k", "fresh one"),
        ("middleware", "m", "key"),
        ("enable_return_routed_experts", False, "router_replay.mode"),
        ("data_parallel_size", 2, "one replica"),
        ("host", "0.0.0.0", "strategy_config.host"),
        ("tensor_parallel_size", 2, "strategy_config.tp_size"),
        ("max_total_tokens", 2, "strategy_config.max_total_tokens"),
        ("max_model_len", 2, "strategy_config.context_length"),
        ("enable_sleep_mode", True, "wake"),
        ("--dtype", "half", "underscores"),
        ("quantization", "fp8", "would not fit"),
        ("hf_overrides", "{}", "trainer's model"),
        ("tokenizer", "x", "checkpoint's directory"),
        ("tokenizer_revision", "x", "checkpoint's directory"),
        ("tokenizer_mode", "slow", "checkpoint's directory"),
        ("revision", "x", "checkpoint's directory"),
        ("code_revision", "x", "checkpoint's directory"),
        ("hf_config_path", "x", "checkpoint's directory"),
        ("hf_token", "x", "every user can read a command line"),
        ("logits_processors", "x", "change the samples"),
        ("watermark_config", "{}", "change the samples"),
        ("offload_group_size", 2, "to the device of the engine"),
        ("offload_params", "x", "to the device of the engine"),
        ("root_path", "/x", "the server's own paths"),
        ("device_ids", "0", "device_mapping"),
        ("device_memory_utilization", 0.5, "strategy_config.gpu_memory_utilization"),
        ("data_parallel_external_lb", True, "one replica"),
        ("runner", "pooling", "generate"),
        ("speculative_conf", "{}", "reads it as speculative_config"),
        ("pipeline_par", 2, "reads it as pipeline_parallel_size"),
    ],
)
def test_owned_arguments_are_refused(name, value, reason):
    (problem,) = refused_server_args(VllmConfig(server_args={name: value}))
    assert name in problem
    assert reason in problem


def test_the_key_is_in_the_environment():
    assert environment(VllmConfig(), {})[launcher.KEY_VARIABLE] == KEY
    assert server_command(VllmConfig(python="/opt/vllm/bin/python"), [])[:2] == [
        "/opt/vllm/bin/python",
        launcher.__file__,
    ]


def test_neither_a_trainers_rank_nor_a_setting_that_nobody_wrote_reaches_the_server():
    inherited = {"PATH": "/bin", "RANK": "3", "TORCHELASTIC_X": "1", "VLLM_PLUGINS": "x", "VLLM_BATCH_INVARIANT": "1"}
    variables = environment(VllmConfig(), inherited)
    assert settings_left_out(inherited) == ["VLLM_BATCH_INVARIANT", "VLLM_PLUGINS"]
    assert variables["PATH"] == "/bin"
    assert not {"RANK", "TORCHELASTIC_X", "VLLM_BATCH_INVARIANT"} & set(variables)
    assert variables[launcher.PARENT_VARIABLE] == str(os.getpid())


def test_a_variable_that_somebody_wrote_reaches_the_server():
    given = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "DO_NOT_TRACK": "0", launcher.KEY_VARIABLE: "another"}
    variables = environment(VllmConfig(), {"VLLM_USE_FLASHINFER_SAMPLER": "1"}, **given)
    assert (variables["VLLM_USE_FLASHINFER_SAMPLER"], variables["DO_NOT_TRACK"]) == ("0", "0")
    assert variables[launcher.KEY_VARIABLE] == KEY


def test_what_a_cpu_needs_is_for_a_cpu_only():
    on_cpu, on_gpu = environment(VllmConfig(), {}), environment(VllmConfig(), {}, device="cuda")
    assert on_cpu["PYTHONPATH"].split(os.pathsep) == [str(PLUGIN_PATH), str(CPU_PATH)]
    assert on_cpu["VLLM_PLUGINS"] == "roll_r3_vllm,roll_r3_vllm_cpu"
    assert on_gpu["PYTHONPATH"] == str(PLUGIN_PATH)
    assert on_gpu["VLLM_PLUGINS"] == "roll_r3_vllm"
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert on_gpu["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert not {"TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"} & set(on_gpu)


def test_the_packages_of_this_interpreter_do_not_reach_the_server():
    variables = environment(VllmConfig(), {"PYTHONPATH": "/mine", "PYTHONHOME": "/mine"}, device="cuda")
    assert variables["PYTHONPATH"] == str(PLUGIN_PATH)
    assert "PYTHONHOME" not in variables


def test_the_launchers_folder_is_not_on_the_servers_import_path(tmp_path):
    """Run up to the first import, here a module of the test."""
    package = tmp_path / "roll_r3_vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "access.py").write_text("import sys\nprint(sys.path)\nsys.exit()\n")
    line = server_command(VllmConfig(python=sys.executable), [])
    variables = {"PYTHONPATH": str(tmp_path), launcher.KEY_VARIABLE: KEY, launcher.PARENT_VARIABLE: str(os.getpid())}
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout
    assert os.path.dirname(launcher.__file__) not in done.stdout


@pytest.mark.parametrize(("path", "name"), [(PLUGIN_PATH, "roll_r3_vllm"), (CPU_PATH, "roll_r3_vllm_cpu")])
def test_vllm_finds_the_plugins_by_their_metadata(path, name):
    (found,) = (entry for d in distributions(path=[str(path)]) for entry in d.entry_points)
    assert (found.group, found.name, found.value) == ("vllm.general_plugins", name, f"{name}:register")
    assert (path / name / "__init__.py").is_file()


@pytest.mark.parametrize("text", ["0.31.9", "0.33.0+cpu", "0.32.1", "0.32.0rc1"])
def test_a_cpu_runs_one_release_only(text):
    with pytest.raises(EngineError, match=r"is not 0\.32\.0.*make vllm-env"):
        check_version(text, device="cpu")


def test_a_gpu_runs_that_release_and_later_ones_with_a_warning():
    assert check_version("0.32.0+cpu", device="cpu") is None
    assert check_version("0.32.0", device="cuda") is None
    assert check_version("0.32.0+cu130", device="cuda") is None
    assert check_version("0.32.0+cpu", device="auto") is None
    assert "newer than 0.32.0" in str(check_version("0.33.0", device="cuda"))
    with pytest.raises(EngineError, match=r"too old.*vllm==0\.32\.0"):
        check_version("0.31.0", device="cuda")
    with pytest.raises(EngineError, match="cannot be read"):
        check_version("main", device="cuda")


@pytest.mark.parametrize("text", ["0.32.0+cpu", "0.33.0+cpu"])
def test_a_gpu_does_not_run_a_build_for_cpus(text):
    with pytest.raises(EngineError, match=r"built for CPUs.*make vllm-env VLLM_KIND=gpu"):
        check_version(text, device="cuda")
