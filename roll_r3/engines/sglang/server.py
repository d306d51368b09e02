"""Command line and environment of an SGLang server, from the configuration. SGLang is not imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from roll_r3 import platform
from roll_r3.config.strategies import SglangConfig
from roll_r3.engines.server_args import (
    CPU_SAMPLES,
    Argument,
    command_line,
    losing_routes,
    refused,
    without_rank,
)
from roll_r3.engines.sglang import launcher

CPU_PATH = Path(platform.__path__[0]) / "sglang_cpu"
"""Modules for a server without a GPU; last on its import path."""

_NO_REPLICAS = "SGLang refuses weight updates to data-parallel replicas; give actor_infer more devices instead"
_OTHER_WEIGHTS = "the trainer's weights would not fit an engine with other ones"
_OWNED = "this strategy sets it itself"

_MOVED = "it was not verified that moved or copied experts are recorded by their number in the model"
_LOSE_ROUTES: dict[str, str] = {
    "pp_size": "pipeline stages do not gather their layers; use tp_size",
    "pipeline_parallel_size": "pipeline stages do not gather their layers; use tp_size",
    "enable_hierarchical_cache": "prefixes that come back from host memory carry no routes",
    "enable_lmcache": "prefixes that come back from an external cache carry no routes",
    "disaggregation_mode": "the prefill server's routes do not travel to the decode server",
    "speculative_algorithm": "draft tokens are not recorded with theirs",
    "speculative_draft_model_path": "routed experts are not recorded with speculative decoding",
    "skip_tokenizer_init": "routed experts come in another form with it",
    "enable_eplb": _MOVED,
    "ep_num_redundant_experts": _MOVED,
    "init_expert_location": _MOVED,
}
"""Features with missing or wrong routed experts."""

_RUNNER = "moe_runner_backend"
RECORDING_RUNNER = "triton"
"""Runner with recorded experts on every GPU."""
_OWN_TOP_K = "its kernel chooses the experts itself, so none are recorded"
_RUNNERS_LOSE_ROUTES: dict[str, str] = {
    "auto": "on a Blackwell GPU SGLang takes it as flashinfer_trtllm, which records no experts",
    "flashinfer_trtllm": _OWN_TOP_K,
    "experimental_sgl_trtllm": _OWN_TOP_K,
    "flashinfer_mxfp4": _OWN_TOP_K,
    "triton_kernel": _OWN_TOP_K,
}
"""Values of `moe_runner_backend` without SGLang's recorder."""

_MASK_TOKENS = 4096
"""SGLang's default limit of a returned set. It refuses requests with a larger top_k, and aborts at a larger set."""
_TIES = 2
"""Factor on top_k for tokens as likely as the last kept one: kernels on a GPU keep all of them."""

_REFUSED: dict[str, str] = {
    "enable_return_routed_experts": "it follows actor_infer.router_replay.mode",
    "sampling_mask_max_tokens": "it follows actor_infer.generating_args.top_k",
    "enable_fp32_lm_head": "it follows fp32_lm_head, which the trainer reads too",
    "dp_size": _NO_REPLICAS,
    "data_parallel_size": _NO_REPLICAS,
    "nnodes": "an engine lives on one node",
    "node_rank": "an engine lives on one node",
    "dist_init_addr": "an engine lives on one node",
    "model_path": f"{_OWNED}, from pretrain or actor_infer.model_args.model_name_or_path",
    "model": f"{_OWNED}, from pretrain or actor_infer.model_args.model_name_or_path",
    "trust_remote_code": f"{_OWNED}, from actor_infer.model_args.trust_remote_code",
    "port": f"{_OWNED}: a free one is taken",
    "api_key": f"{_OWNED}: a fresh one for every start, never on a command line",
    "admin_api_key": f"{_OWNED}: the one key opens everything",
    "device": f"{_OWNED}, from device_type",
    "base_gpu_id": f"{_OWNED}, from actor_infer.device_mapping",
    "random_seed": f"{_OWNED}, from seed",
    "weight_version": f"{_OWNED}: it counts weight updates",
    "skip_server_warmup": f"{_OWNED}: it warms the server up with a checked generation",
    "preferred_sampling_params": "it would override generating_args",
    "config": "a file could set refused arguments; write its entries under server_args",
    "tokenizer_worker_num": "SGLang does not support an API key with it",
    "ssl_keyfile": "the client speaks plain HTTP",
    "ssl_certfile": "the client speaks plain HTTP",
    "grpc_mode": "the client speaks HTTP",
    "smg_grpc_mode": "the client speaks HTTP",
    "encoder_only": "the server must generate",
    "use_ray": "the strategy starts the server itself",
    "tensor_parallel_size": "write strategy_config.tp_size instead",
    "tp": "write strategy_config.tp_size instead",
    "quantization": _OTHER_WEIGHTS,
    "torchao_config": _OTHER_WEIGHTS,
    "modelopt_quant": _OTHER_WEIGHTS,
    "quantize_and_serve": _OTHER_WEIGHTS,
    "enable_lora": _OTHER_WEIGHTS,
    "lora_paths": _OTHER_WEIGHTS,
    "json_model_override_args": "the engine must run the trainer's model",
}


def args_that_lose_routes(config: SglangConfig, *, record_routes: bool) -> list[str]:
    """Return one message for each entry of `server_args` with missing or wrong routed experts.

    Args:
        record_routes: True if routes are requested. Some entries are harmless otherwise.
    """
    found = losing_routes(config, _LOSE_ROUTES)
    runner = config.server_args.get(_RUNNER)
    if record_routes and (reason := _RUNNERS_LOSE_ROUTES.get(str(runner))):
        found.append(f"server_args.{_RUNNER}: {runner}: {reason}; leave it out to have {RECORDING_RUNNER}")
    return found


def refused_server_args(config: SglangConfig) -> list[str]:
    """Return one message for each other refused entry of `server_args`."""
    return refused(config, _REFUSED, _LOSE_ROUTES, "SGLang")


def server_arguments(
    config: SglangConfig,
    *,
    model_path: str,
    trust_remote_code: bool,
    device: str,
    port: int,
    seed: int,
    context_length: int,
    record_routes: bool,
    fp32_lm_head: bool,
    kept_top_k: int = 0,
) -> list[str]:
    """Return SGLang's command line, without the key.

    In `server_args` True becomes a bare flag. False is left out: SGLang's flags are off by default.

    Args:
        context_length: default of the configuration's.
        kept_top_k: top_k of requests for kept tokens; 0: there are none.
    """
    arguments: dict[str, Argument] = {
        "model_path": model_path,
        "trust_remote_code": trust_remote_code,
        "host": config.host,
        "port": port,
        "load_format": "safetensors",  # otherwise pickles are accepted if there are none
        "device": device,
        "dtype": config.dtype,
        "tp_size": config.tp_size,
        "random_seed": seed,
        "context_length": config.context_length or context_length,
        "mem_fraction_static": config.mem_fraction_static,
        "max_total_tokens": config.max_total_tokens,
        "max_running_requests": config.max_running_requests,
        "chunked_prefill_size": config.chunked_prefill_size,
        "attention_backend": config.attention_backend,
        "enable_return_routed_experts": record_routes,
        "enable_fp32_lm_head": fp32_lm_head,
        "weight_version": "0",
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # otherwise each scheduler polls on a core of its own while the trainer trains
        "log_level_http": "warning",
    }
    if _TIES * kept_top_k > _MASK_TOKENS:
        arguments["sampling_mask_max_tokens"] = _TIES * kept_top_k
    if device == "cpu":
        room = (config.max_running_requests or CPU_SAMPLES) * (config.context_length or context_length)
        arguments |= {
            "max_total_tokens": config.max_total_tokens or room,
            "attention_backend": config.attention_backend or "torch_native",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "enable_deterministic_inference": True,  # without it SGLang ignores a request's seed
        }
    elif record_routes:
        arguments[_RUNNER] = RECORDING_RUNNER
    arguments |= config.server_args
    return command_line(arguments)


def server_command(config: SglangConfig, arguments: list[str]) -> list[str]:
    return [config.python or sys.executable, launcher.__file__, *arguments]


def server_environment(
    config: SglangConfig,
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
    environment = without_rank(inherited) | {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the checkpoint is a directory here
        # A crashed server would stay up for 5 s (60 s with CUDA) to write dumps, with requests waiting.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    }
    # It would return log-probabilities before the sampling temperature.
    environment.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
    environment |= {**given, launcher.KEY_VARIABLE: key, launcher.PARENT_VARIABLE: str(os.getpid())}
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpu_ids)
    else:
        environment |= {
            launcher.CPU_PATH_VARIABLE: str(CPU_PATH),
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # its small operations are several times slower with a pool of threads
        }
        if config.tp_size > 1:
            cores = os.cpu_count() or 1
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % cores) for rank in range(config.tp_size))
    return environment
