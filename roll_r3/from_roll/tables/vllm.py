"""Settings of vLLM."""

from __future__ import annotations

import json

from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import Custom, Renamed, Row, Same, Step, Unread, Unsupported, under
from roll_r3.from_roll.tables.engines import pass_on

_VLLM = "<vllm>.strategy_args.strategy_config"
_ENGINE = "actor_infer.strategy_args.strategy_config"


def _server_argument(draft: Draft, keys: Keys) -> None:
    """Pass a section on as JSON: vLLM takes it on its command line."""
    value = draft.get(keys)
    pass_on(draft, keys, json.dumps(value) if isinstance(value, dict) else value)


STEPS: tuple[Step, ...] = ()

ROWS = (
    Row(under(_VLLM, "gpu_memory_utilization"), Same()),
    Row(under(_VLLM, "max_model_len"), Renamed(f"{_ENGINE}.context_length", "the engine's context, in tokens")),
    Row(under(_VLLM, "max_num_seqs"), Renamed(f"{_ENGINE}.max_running_requests", "samples decoded at once")),
    Row(
        under(_VLLM, "num_gpu_blocks_override kv_cache_memory_bytes"),
        Unsupported((), "write strategy_config.max_total_tokens for the size of the cache"),
    ),
    Row(
        under(_VLLM, "sleep_level enable_sleep_mode load_format"),
        Unread("the engine starts from the checkpoint and keeps its memory"),
    ),
    Row(
        under(_VLLM, "block_size enable_prefix_caching"),
        Unread("vLLM chooses blocks; prefixes are always shared, with their routes"),
    ),
    Row(
        under(_VLLM, "disable_log_stats disable_log_requests enable_log_requests"),
        Unread("log output has no settings"),
    ),
    Row(
        under(_VLLM, "model seed trust_remote_code"),
        Unread("set by ROLL itself, and by roll_r3"),
    ),
    Row(
        under(_VLLM, "logprobs_mode max_logprobs"),
        Unread("log-probabilities are of sampled tokens"),
    ),
    Row(
        under(_VLLM, "distributed_executor_backend data_parallel_backend"),
        Unread("an engine's server starts its processes"),
    ),
    Row(
        under(_VLLM, "VLLM_USE_V1 swap_space max_seq_len_to_capture num_scheduler_steps")
        + under(_VLLM, "disable_async_output_proc use_v2_block_manager"),
        Unread("about speed, in earlier versions of vLLM"),
    ),
    Row(
        under(_VLLM, "cuda_graph_sizes cudagraph_capture_sizes"),
        Unread("vLLM chooses CUDA graph batch sizes"),
    ),
    Row(
        under(_VLLM, "disable_mm_preprocessor_cache mm_processor_cache_gb limit_mm_per_prompt")
        + under(_VLLM, "mm_processor_kwargs skip_mm_profiling"),
        Unread("prompts are text: no such processor runs"),
    ),
    Row(under(_VLLM, "pipeline_parallel_size"), Unsupported((1,), "routes are not gathered over an engine's stages")),
    Row(
        under(_VLLM, "data_parallel_size"),
        Unsupported((1,), "weights go to one replica; there are devices / tp_size engines"),
    ),
    Row(
        under(_VLLM, "decode_context_parallel_size prefill_context_parallel_size"),
        Unsupported((1,), "routes are not gathered over an engine's context-parallel ranks"),
    ),
    Row(under(_VLLM, "speculative_config"), Unsupported(({},), "routes of draft tokens are not recorded")),
    Row(
        under(_VLLM, "enable_eplb enable_elastic_ep"),
        Unsupported((False,), "moved or copied experts may get another number in routes"),
    ),
    Row(under(_VLLM, "kv_transfer_config"), Unsupported(({},), "prefixes from elsewhere carry no routes")),
    Row(
        under(_VLLM, "quantization quantization_config online_quantization"),
        Unsupported((), "the engine holds the trainer's weights unchanged"),
    ),
    Row(under(_VLLM, "online_quantization_config"), Unread("read with online_quantization only")),
    Row(under(_VLLM, "hf_overrides"), Unsupported(({},), "the engine runs the trainer's model")),
    Row(under(_VLLM, "enable_lora"), Unsupported((False,), "all weights are trained; there is no LoRA")),
    Row(under(_VLLM, "max_loras max_lora_rank"), Unread("read with LoRA only")),
    Row(under(_VLLM, "cpu_offload_gb"), Unsupported((0,), "the trainer writes weights where the engine computes")),
    Row(under(_VLLM, "worker_extension_cls worker_cls"), Unsupported((), "workers cannot be replaced")),
    Row(
        under(
            _VLLM,
            "additional_config all2all_backend async_scheduling attention_backend attention_config "
            "compilation_config disable_custom_all_reduce enable_chunked_prefill enable_expert_parallel "
            "enforce_eager gdn_prefill_backend kv_cache_dtype long_prefill_token_threshold "
            "max_cudagraph_capture_size max_num_batched_tokens moe_backend optimization_level "
            "scheduling_policy stream_interval",
        ),
        Custom(_server_argument, "`strategy_config.server_args`, a section as JSON"),
    ),
)
