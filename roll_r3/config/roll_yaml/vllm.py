"""vLLM's engine."""

from __future__ import annotations

import json

from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.engines import pass_on
from roll_r3.config.roll_yaml.rows import By, Moved, Off, Row, Same, Step, Unread, under
from roll_r3.config.tree import Keys

_VLLM = "<vllm>.strategy_args.strategy_config"
_ENGINE = "actor_infer.strategy_args.strategy_config"


def _server_argument(draft: Draft, keys: Keys) -> None:
    """ROLL hands sections to vLLM as they are; on a command line they are JSON."""
    value = draft.get(keys)
    pass_on(draft, keys, json.dumps(value) if isinstance(value, dict) else value)


STEPS: tuple[Step, ...] = ()

ROWS = (
    Row(under(_VLLM, "gpu_memory_utilization"), Same()),
    Row(under(_VLLM, "max_model_len"), Moved(f"{_ENGINE}.context_length", "the engine's context, in tokens")),
    Row(under(_VLLM, "max_num_seqs"), Moved(f"{_ENGINE}.max_running_requests", "samples that it decodes at once")),
    Row(
        under(_VLLM, "num_gpu_blocks_override", "kv_cache_memory_bytes"),
        Off((), "the size of the cache is strategy_config.max_total_tokens, in tokens"),
    ),
    Row(
        under(_VLLM, "sleep_level", "enable_sleep_mode", "load_format"),
        Unread("the engine starts from the checkpoint and keeps its memory between steps"),
    ),
    Row(
        under(_VLLM, "block_size", "enable_prefix_caching"),
        Unread("vLLM chooses the cache's blocks; prefixes are always shared, and their routes with them"),
    ),
    Row(
        under(_VLLM, "disable_log_stats", "disable_log_requests", "enable_log_requests"),
        Unread("what the engine writes into its log is not set here"),
    ),
    Row(
        under(_VLLM, "model", "seed", "trust_remote_code"),
        Unread("ROLL sets them itself, and so does roll_r3"),
    ),
    Row(
        under(_VLLM, "logprobs_mode", "max_logprobs"),
        Unread("log-probabilities are those of the sampled tokens, as the trainer needs them"),
    ),
    Row(
        under(_VLLM, "distributed_executor_backend", "data_parallel_backend"),
        Unread("an engine's processes are started by its own server"),
    ),
    Row(
        under(_VLLM, "VLLM_USE_V1", "swap_space", "max_seq_len_to_capture", "num_scheduler_steps")
        + under(_VLLM, "disable_async_output_proc", "use_v2_block_manager"),
        Unread("they are of earlier vLLMs, and about speed"),
    ),
    Row(
        under(_VLLM, "cuda_graph_sizes", "cudagraph_capture_sizes"),
        Unread("vLLM chooses the batch sizes that it captures as CUDA graphs, which is about speed"),
    ),
    Row(
        under(_VLLM, "disable_mm_preprocessor_cache", "mm_processor_cache_gb", "limit_mm_per_prompt")
        + under(_VLLM, "mm_processor_kwargs", "skip_mm_profiling"),
        Unread("prompts are text, which no such processor sees"),
    ),
    Row(under(_VLLM, "pipeline_parallel_size"), Off((1,), "an engine's stages do not gather their routes")),
    Row(
        under(_VLLM, "data_parallel_size"), Off((1,), "weights are sent to one replica: engines are devices / tp_size")
    ),
    Row(
        under(_VLLM, "decode_context_parallel_size", "prefill_context_parallel_size"),
        Off((1,), "an engine's context-parallel ranks do not gather their routes"),
    ),
    Row(under(_VLLM, "speculative_config"), Off(({},), "draft tokens' routes are not recorded with theirs")),
    Row(
        under(_VLLM, "enable_eplb", "enable_elastic_ep"),
        Off((False,), "experts that are moved or copied may be recorded by another number"),
    ),
    Row(under(_VLLM, "kv_transfer_config"), Off(({},), "prefixes that come from elsewhere carry no routes")),
    Row(
        under(_VLLM, "quantization", "quantization_config", "online_quantization"),
        Off((), "the engine holds the trainer's weights as they are"),
    ),
    Row(under(_VLLM, "online_quantization_config"), Unread("it is read with online_quantization only")),
    Row(under(_VLLM, "hf_overrides"), Off(({},), "the engine runs the trainer's model")),
    Row(under(_VLLM, "enable_lora"), Off((False,), "all weights are trained; there is no LoRA")),
    Row(under(_VLLM, "max_loras", "max_lora_rank"), Unread("they are read with LoRA only")),
    Row(under(_VLLM, "cpu_offload_gb"), Off((0,), "the trainer's weights are written where the engine computes")),
    Row(under(_VLLM, "worker_extension_cls", "worker_cls"), Off((), "workers cannot be replaced")),
    Row(
        under(
            _VLLM,
            "additional_config",
            "all2all_backend",
            "async_scheduling",
            "attention_backend",
            "attention_config",
            "compilation_config",
            "disable_custom_all_reduce",
            "enable_chunked_prefill",
            "enable_expert_parallel",
            "enforce_eager",
            "gdn_prefill_backend",
            "kv_cache_dtype",
            "long_prefill_token_threshold",
            "max_cudagraph_capture_size",
            "max_num_batched_tokens",
            "moe_backend",
            "optimization_level",
            "scheduling_policy",
            "stream_interval",
        ),
        By(_server_argument, "`strategy_config.server_args`, a section as JSON"),
    ),
)
