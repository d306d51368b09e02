"""Settings of SGLang."""

from __future__ import annotations

from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import Custom, Row, Same, Step, Unread, Unsupported, under
from roll_r3.from_roll.tables.engines import pass_on

_SGLANG = "<sglang>.strategy_args.strategy_config"
_SERVER_ARGUMENTS = (
    "cuda_graph_max_bs disable_cuda_graph disable_cuda_graph_padding disable_custom_all_reduce "
    "disable_overlap_schedule disable_radix_cache dp_size enable_dp_attention enable_ep_moe "
    "enable_hierarchical_cache enable_metrics enable_mixed_chunk enable_p2p_check enable_torch_compile ep_size "
    "grammar_backend grpc_mode kv_cache_dtype log_level max_prefill_tokens moe_a2a_backend moe_runner_backend "
    "num_continuous_decode_steps page_size quantization sampling_backend schedule_conservativeness "
    "schedule_policy speculative_algorithm speculative_draft_model_path speculative_eagle_topk "
    "speculative_num_draft_tokens speculative_num_steps stream_interval swa_full_tokens_ratio "
    "torch_compile_max_bs watchdog_timeout"
)
"""Arguments of SGLang passed on by ROLL. Rules of the strategy reject unsupported ones."""


def _server_argument(draft: Draft, keys: Keys) -> None:
    pass_on(draft, keys, draft.get(keys))


STEPS: tuple[Step, ...] = ()

ROWS = (
    Row(
        under(
            _SGLANG,
            "mem_fraction_static max_running_requests max_total_tokens context_length "
            "chunked_prefill_size attention_backend host",
        ),
        Same(),
    ),
    Row(
        under(_SGLANG, "load_format enable_memory_saver"),
        Unread("the engine starts from the checkpoint and keeps its memory"),
    ),
    Row(
        under(_SGLANG, "cuda_graph_bs log_level_http decode_log_interval log_requests"),
        Unread("SGLang chooses CUDA graph batch sizes and log output"),
    ),
    Row(
        under(_SGLANG, "model_path port random_seed skip_tokenizer_init trust_remote_code nnodes")
        + under(_SGLANG, "node_rank"),
        Unread("set by ROLL itself, and by roll_r3"),
    ),
    Row(
        under(_SGLANG, "enable_fp32_lm_head"),
        Unsupported((False,), "the trainer would still round logits: write fp32_lm_head: true, for both"),
    ),
    Row(
        under(_SGLANG, "pipeline_parallel_size pp_size"),
        Unsupported((1,), "routes are not gathered over an engine's stages"),
    ),
    Row(
        under(_SGLANG, _SERVER_ARGUMENTS),
        Custom(_server_argument, "`strategy_config.server_args`, except arguments that lose routes"),
    ),
)
