"""Command line and environment of a vLLM server, from the configuration. vLLM is not imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from roll_r3 import platform
from roll_r3.config.sampling_settings import Sampling
from roll_r3.config.strategies import VllmConfig
from roll_r3.engines.server_args import (
    CPU_SAMPLES,
    Argument,
    command_line,
    losing_routes,
    refused,
    without_rank,
)
from roll_r3.engines.vllm import launcher
from roll_r3.models.size import Shape

PLUGIN_PATH = Path(__file__).parent / "plugin"
"""Import path of the plugin for every server."""
CPU_PATH = Path(platform.__path__[0]) / "vllm_cpu"
"""Import path of the modules for a server without a GPU."""

_BLOCK = 32
"""Tokens per block of the cache, as required by the CPU kernel. On a GPU vLLM has its own; there this only rounds."""
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME")
"""Variables for the interpreter of roll_r3: its packages would replace those pinned by vLLM."""

_OWNED = "this strategy sets it itself"
_NO_REPLICAS = "weights are sent to one replica; give actor_infer more devices instead"
_ONE_NODE = "an engine lives on one node"
_OTHER_WEIGHTS = "the trainer's weights would not fit an engine with other ones"
_ONE_DIRECTORY = "everything is read from the checkpoint's directory, as in the trainer"
_OTHER_SAMPLING = "it would change the samples after log-probabilities are taken"
_OTHER_CODE = "routes are recorded by vLLM's own classes"
_OFFLOADED = "the trainer's weights are written to the device of the engine"
_SPECULATION = "draft tokens are not recorded with theirs"
_CONTEXT_PARALLEL = "vLLM does not gather routes over context-parallel ranks"
_TRANSFER = "prefixes that come from elsewhere carry no routes"
_MOVED = "it was not verified that moved or copied experts are recorded by their number in the model"

_LOSE_ROUTES: dict[str, str] = {
    "pipeline_parallel_size": "pipeline stages do not gather their layers; use tp_size",
    "pp": "pipeline stages do not gather their layers; use tp_size",
    "enable_prefix_caching": "the recorder of routes shares the prefix cache, which is on",
    "no_enable_prefix_caching": "the recorder of routes shares the prefix cache",
    "speculative_config": _SPECULATION,
    "speculative_model": _SPECULATION,
    "spec_method": _SPECULATION,
    "spec_model": _SPECULATION,
    "spec_tokens": _SPECULATION,
    "decode_context_parallel_size": _CONTEXT_PARALLEL,
    "dcp": _CONTEXT_PARALLEL,
    "prefill_context_parallel_size": _CONTEXT_PARALLEL,
    "pcp": _CONTEXT_PARALLEL,
    "kv_transfer_config": _TRANSFER,
    "kv_offloading_size": _TRANSFER,
    "kv_offloading_backend": _TRANSFER,
    "aux_output_config": "it belongs to the recording of routes, which the strategy sets up",
    "enable_eplb": _MOVED,
    "eplb_config": _MOVED,
    "enable_elastic_ep": _MOVED,
    "worker_cls": _OTHER_CODE,
    "worker_extension_cls": _OTHER_CODE,
    "scheduler_cls": _OTHER_CODE,
    "model_impl": _OTHER_CODE,
    "model_class_overrides": _OTHER_CODE,
}
"""Features with missing or wrong routed experts."""

_REFUSED: dict[str, str] = {
    "enable_return_routed_experts": "it follows actor_infer.router_replay.mode",
    "data_parallel_size": _NO_REPLICAS,
    "dp": _NO_REPLICAS,
    "data_parallel_size_local": _NO_REPLICAS,
    "data_parallel_rank": _NO_REPLICAS,
    "data_parallel_start_rank": _NO_REPLICAS,
    "data_parallel_address": _NO_REPLICAS,
    "data_parallel_rpc_port": _NO_REPLICAS,
    "data_parallel_backend": _NO_REPLICAS,
    "data_parallel_hybrid_lb": _NO_REPLICAS,
    "data_parallel_external_lb": _NO_REPLICAS,
    "data_parallel_multi_port_external_lb": _NO_REPLICAS,
    "api_server_count": "the strategy speaks to one server process",
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "master_addr": _ONE_NODE,
    "headless": _ONE_NODE,
    "distributed_executor_backend": "the engine's processes must end with its server",
    "model": f"{_OWNED}, from pretrain or actor_infer.model_args.model_name_or_path",
    "revision": _ONE_DIRECTORY,
    "code_revision": _ONE_DIRECTORY,
    "hf_config_path": _ONE_DIRECTORY,
    "hf_token": f"{_ONE_DIRECTORY}, and every user can read a command line",
    "config_format": _ONE_DIRECTORY,
    "tokenizer": _ONE_DIRECTORY,
    "tokenizer_revision": _ONE_DIRECTORY,
    "tokenizer_mode": _ONE_DIRECTORY,
    "runner": "the server must generate",
    "convert": "the server must generate",
    "device_ids": f"{_OWNED}, from actor_infer.device_mapping",
    "trust_remote_code": f"{_OWNED}, from actor_infer.model_args.trust_remote_code",
    "port": f"{_OWNED}: a free one is taken",
    "uds": f"{_OWNED}: a free port is taken",
    "api_key": f"{_OWNED}: a fresh one for every start, never on a command line",
    "middleware": f"{_OWNED}: it checks the key",
    "root_path": "the client uses the server's own paths",
    "seed": f"{_OWNED}, from seed",
    "max_model_len": "write strategy_config.context_length instead",
    "max_num_seqs": "write strategy_config.max_running_requests instead",
    "tensor_parallel_size": "write strategy_config.tp_size instead",
    "tp": "write strategy_config.tp_size instead",
    "device_memory_utilization": "write strategy_config.gpu_memory_utilization instead",
    "num_gpu_blocks_override": "write strategy_config.max_total_tokens instead",
    "kv_cache_memory_bytes": "write strategy_config.max_total_tokens instead",
    "block_size": f"{_OWNED} where it matters, on a CPU",
    "weight_transfer_config": f"{_OWNED}: the trainer sends weights its own way",
    "enable_scale_out": f"{_OWNED}: it requests tokens, not text",
    "enable_prompt_tokens_details": f"{_OWNED}, where routes are recorded",
    "logprobs_mode": f"{_OWNED}, from generating_args",
    "return_sampling_mask": "it follows actor_infer.generating_args.sampling_mask",
    "max_logprobs": "the strategy requests those of the sampled tokens",
    "logits_processors": _OTHER_SAMPLING,
    "watermark_config": _OTHER_SAMPLING,
    "generation_config": "it would override generating_args",
    "override_generation_config": "it would override generating_args",
    "skip_tokenizer_init": "the server must know where a sequence ends",
    "config": "a file could set refused arguments; write its entries under server_args",
    "grpc": "the client speaks HTTP",
    "ssl_keyfile": "the client speaks plain HTTP",
    "ssl_certfile": "the client speaks plain HTTP",
    "enable_sleep_mode": "nothing would wake the engine; it keeps its memory between steps",
    "offload_backend": _OFFLOADED,
    "cpu_offload_gb": _OFFLOADED,
    "cpu_offload_params": _OFFLOADED,
    "offload_group_size": _OFFLOADED,
    "offload_num_in_group": _OFFLOADED,
    "offload_prefetch_step": _OFFLOADED,
    "offload_params": _OFFLOADED,
    "quantization": _OTHER_WEIGHTS,
    "quantization_config": _OTHER_WEIGHTS,
    "enable_lora": _OTHER_WEIGHTS,
    "lora_modules": _OTHER_WEIGHTS,
    "load_format": _OTHER_WEIGHTS,
    "hf_overrides": "the engine must run the trainer's model",
}

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head supported by vLLM 0.32's CPU kernel."""


def args_that_lose_routes(config: VllmConfig) -> list[str]:
    """Return one message for each entry of `server_args` with missing or wrong routed experts."""
    return losing_routes(config, _LOSE_ROUTES)


def refused_server_args(config: VllmConfig) -> list[str]:
    """Return one message for each other refused entry of `server_args`."""
    return refused(config, _REFUSED, _LOSE_ROUTES, "vLLM")


def cpu_lacks_a_kernel(shape: Shape) -> str:
    """Return why vLLM does not serve a model of this shape on a CPU; empty if it does."""
    if shape.latent is not None:
        return "it does not serve latent attention there"
    if shape.key_dim not in CPU_HEADS:
        return f"its kernel takes attention heads of {', '.join(map(str, CPU_HEADS))}, and the model's {shape.key_dim}"
    return ""


def cache_bytes(config: VllmConfig, shape: Shape, tokens: int, block: int) -> int:
    """Return the bytes of a cache of `tokens` on each device, in whole blocks, plus one block reserved by vLLM."""
    if shape.latent is not None:
        values = shape.latent.key_value_rank + shape.latent.rotary_dim
    else:
        values = -(-shape.kv_heads // config.tp_size) * (shape.key_dim + shape.value_dim)
    blocks = -(-tokens // block) + 1
    return blocks * block * shape.num_layers * values * _BYTES[config.dtype]


def server_arguments(
    config: VllmConfig,
    *,
    model_path: str,
    trust_remote_code: bool,
    device: str,
    port: int,
    seed: int,
    sampling: Sampling,
    context_length: int,
    record_routes: bool,
    shape: Shape,
) -> list[str]:
    """Return vLLM's command line, without the key.

    In `server_args` True becomes a bare flag, and False the flag with `no-` before it.

    Args:
        sampling: settings of training's samples. vLLM's raw log-probabilities are before temperature and truncation;
            with either they must be taken after both.
        context_length: default of the configuration's.
        shape: of the model; it determines the cache's memory.
    """
    context = config.context_length or context_length
    arguments: dict[str, Argument] = {
        "model": model_path,
        "trust_remote_code": trust_remote_code,
        "host": config.host,
        "port": port,
        "load_format": "safetensors",  # otherwise pickles are accepted if there are none
        "dtype": config.dtype,
        "tensor_parallel_size": config.tp_size,
        "distributed_executor_backend": "mp",
        "seed": seed,
        "max_model_len": context,
        "max_num_seqs": config.max_running_requests,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_return_routed_experts": record_routes,
        "enable_scale_out": True,
        "enable_prompt_tokens_details": record_routes,  # number of cached prompt tokens
        "logprobs_mode": "raw_logprobs" if sampling.is_plain else "processed_logprobs",
        "return_sampling_mask": sampling.return_kept,
        "weight_transfer_config": json.dumps({"backend": "roll_r3"}),
        "disable_uvicorn_access_log": True,
    }
    tokens = config.max_total_tokens
    if device == "cpu":
        running = config.max_running_requests or CPU_SAMPLES
        tokens = tokens or context * running  # vLLM's default is nearly all of a machine's memory
        arguments |= {"enforce_eager": True, "block_size": _BLOCK, "max_num_seqs": running}
    if tokens is not None:
        arguments["kv_cache_memory_bytes"] = cache_bytes(config, shape, tokens, _BLOCK)
    arguments |= config.server_args
    return command_line(arguments, negated=config.server_args)


def server_command(config: VllmConfig, arguments: list[str]) -> list[str]:
    return [config.python, launcher.__file__, *arguments]


def settings_left_out(inherited: Mapping[str, str]) -> list[str]:
    """Return the names of vLLM's variables. A server does not inherit them: they are not in the configuration."""
    return sorted(name for name in inherited if name.startswith("VLLM_"))


def server_environment(
    config: VllmConfig,
    inherited: Mapping[str, str],
    given: Mapping[str, str],
    *,
    device: str,
    gpu_ids: tuple[int, ...],
    key: str,
) -> dict[str, str]:
    """Return the environment of a server.

    Args:
        inherited: environment of this process.
        given: variables of the configuration. They take precedence over defaults here, but not over what the server
            needs.
    """
    left_out = {*_PYTHON_VARIABLES, *settings_left_out(inherited)}
    environment = {name: value for name, value in without_rank(inherited).items() if name not in left_out}
    plugins, path = ["roll_r3_vllm"], [str(PLUGIN_PATH)]
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a directory here
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **given,
        launcher.KEY_VARIABLE: key,
        launcher.PARENT_VARIABLE: str(os.getpid()),
        "VLLM_SERVER_DEV_MODE": "1",  # the update API; our middleware guards it
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if device == "cuda":
        environment |= {
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpu_ids),
            "VLLM_USE_V2_MODEL_RUNNER": "1",  # this runner records routes
        }
    else:
        plugins, path = [*plugins, "roll_r3_vllm_cpu"], [*path, str(CPU_PATH)]
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # its small operations are several times slower with a pool of threads
            # otherwise the ranks of every engine are bound to the same first cores
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",  # compiling needs a C++ compiler and Triton
        }
    environment["VLLM_PLUGINS"] = ",".join(plugins)
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment
