"""SGLang's engine."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import By, Joint, Off, Row, Same, Step, Unread, under
from roll_r3.config.tree import Keys, dotted

_SGLANG = "<engine>.strategy_args.strategy_config"
_ENGINE = "actor_infer.strategy_args.strategy_config"
_DTYPES = {"fp16": "float16", "fp32": "float32"}
_SERVER_ARGUMENTS = (
    "cuda_graph_max_bs",
    "disable_cuda_graph",
    "disable_cuda_graph_padding",
    "disable_custom_all_reduce",
    "disable_overlap_schedule",
    "disable_radix_cache",
    "dp_size",
    "enable_dp_attention",
    "enable_ep_moe",
    "enable_hierarchical_cache",
    "enable_metrics",
    "enable_mixed_chunk",
    "enable_p2p_check",
    "enable_torch_compile",
    "ep_size",
    "grammar_backend",
    "grpc_mode",
    "kv_cache_dtype",
    "log_level",
    "max_prefill_tokens",
    "moe_a2a_backend",
    "moe_runner_backend",
    "num_continuous_decode_steps",
    "page_size",
    "quantization",
    "sampling_backend",
    "schedule_conservativeness",
    "schedule_policy",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_num_steps",
    "stream_interval",
    "swa_full_tokens_ratio",
    "torch_compile_max_bs",
    "watchdog_timeout",
)
"""SGLang's own arguments that ROLL passes on. Which of them cannot be is said by the rules of the strategy."""


def _engine_size(draft: Draft) -> None:
    """An SGLang engine of ROLL takes tensor_parallel_size devices, or else num_gpus_per_worker."""
    sizes = (f"{_ENGINE}.tensor_parallel_size", "actor_infer.num_gpus_per_worker")
    given = [path for path in sizes if draft.has(path) and draft.strategy("actor_infer") == "sglang"]
    if given:
        _take_size(draft, given[0])
    for keys in draft.expand(f"{_SGLANG}.tensor_parallel_size") + draft.expand("<role>.num_gpus_per_worker"):
        if draft.get(keys) is None:
            draft.drop(keys)
        elif dotted(keys) not in given[:1]:
            draft.unread(keys)


def _take_size(draft: Draft, path: str) -> None:
    size = draft.get(path)
    if size == 1 and draft.get(f"{_ENGINE}.tp_size") is ABSENT:
        draft.drop(path)
    else:
        draft.translate(path, {f"{_ENGINE}.tp_size": size}, "devices of one engine")


def _engine_dtype(draft: Draft) -> None:
    """ROLL's engine computes in model_args.dtype."""
    path = "actor_infer.model_args.dtype"
    name = draft.get(path)
    if draft.is_rolls and draft.strategy("actor_infer") == "sglang" and isinstance(name, str) and name in _DTYPES:
        draft.translate(path, {f"{_ENGINE}.dtype": _DTYPES[name]}, "the engine's precision")


def _buckets(draft: Draft) -> None:
    path = "model_update_buffer_size_mb"
    if draft.has(path) and draft.strategy("actor_infer") == "sglang":
        draft.translate(
            path, {f"{_ENGINE}.weight_bucket_mb": draft.get(path)}, "weights go out in groups of so many MiB"
        )
    elif draft.get(path) is None:
        draft.drop(path)
    elif draft.has(path):
        draft.unread(path)


def _server_argument(draft: Draft, keys: Keys) -> None:
    if draft.get(keys) is None:
        draft.drop(keys)
    else:
        target = (*keys[:-1], "server_args", keys[-1])
        draft.translate(keys, {target: draft.get(keys)}, "an argument of SGLang's own")


STEPS: tuple[Step, ...] = (_engine_size, _engine_dtype, _buckets)

ROWS = (
    Row(
        under(
            _SGLANG,
            "mem_fraction_static",
            "max_running_requests",
            "max_total_tokens",
            "context_length",
            "chunked_prefill_size",
            "attention_backend",
            "host",
        ),
        Same(),
    ),
    Row(
        (f"{_SGLANG}.tensor_parallel_size", "actor_infer.num_gpus_per_worker"),
        Joint("`strategy_config.tp_size`; `num_gpus_per_worker` has no effect for other roles and engines"),
    ),
    Row(("actor_infer.model_args.dtype",), Joint("`bf16` is the default; else `strategy_config.dtype`")),
    Row(("model_update_buffer_size_mb",), Joint("`actor_infer.strategy_args.strategy_config.weight_bucket_mb`")),
    Row(
        under(_SGLANG, "load_format", "enable_memory_saver"),
        Unread("the engine starts from the checkpoint and keeps its memory"),
    ),
    Row(
        under(_SGLANG, "model_path", "port", "random_seed", "skip_tokenizer_init", "trust_remote_code", "nnodes")
        + under(_SGLANG, "node_rank"),
        Unread("ROLL sets them itself, and so does roll_r3"),
    ),
    Row(
        under(_SGLANG, "pipeline_parallel_size", "pp_size"), Off((1,), "an engine's stages do not gather their routes")
    ),
    Row(
        under(_SGLANG, *_SERVER_ARGUMENTS),
        By(_server_argument, "`strategy_config.server_args`, which refuses what loses routes"),
    ),
)
