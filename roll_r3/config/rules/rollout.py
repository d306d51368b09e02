"""Sampling, and the engine's limits of it."""

from __future__ import annotations

from roll_r3.config.derived import engine_room, returns_kept, server, sglang, truncates, vllm
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import OWN_GPUS
from roll_r3.config.rules.paths import ENGINE
from roll_r3.config.rules.table import AnyRule, Rule, Verdict, unread

VLLM_COLDEST = 0.01
_VLLM = "actor_infer.strategy_args={strategy_name: vllm}"
_ROOM = (
    "prompt_length",
    "response_length",
    "actor_infer.generating_args.max_new_tokens",
    "validation.generating_args.max_new_tokens",
)


def _too_little(config: RLVRConfig, tokens: int | None) -> Verdict:
    needed = engine_room(config)
    return f"it takes {needed}" if tokens is not None and tokens < needed else False


def _context_too_short(config: RLVRConfig) -> Verdict:
    settings = server(config)
    return settings is not None and _too_little(config, settings.context_length)


def _cache_too_small(config: RLVRConfig) -> Verdict:
    settings = server(config)
    return settings is not None and _too_little(config, settings.max_total_tokens)


def _memory_share_on_cpu(config: RLVRConfig) -> Verdict:
    on_sglang, on_vllm = sglang(config), vllm(config)
    share = on_sglang.mem_fraction_static if on_sglang else on_vllm.gpu_memory_utilization if on_vllm else None
    return config.device_type == "cpu" and share is not None


def _whole_log_probs(config: RLVRConfig) -> Verdict:
    if not truncates(config) or returns_kept(config):
        return False
    if vllm(config) is None:
        return "the rollout's are of the whole one too, so metrics do not show it"
    return "the rollout's are of the truncated one: trainer / rollout is too small by sampling_mask/mass"


def _too_cold(config: RLVRConfig) -> Verdict:
    return vllm(config) is not None and config.actor_infer.generating_args.temperature < VLLM_COLDEST


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="response-fits",
        fields=("actor_infer.generating_args.max_new_tokens", "response_length"),
        why="the engine could sample more tokens than response_length, the longest response allowed",
        fix="leave max_new_tokens out, or raise response_length",
        wrong=("response_length=8", "actor_infer.generating_args.max_new_tokens=9"),
        right=("response_length=8", "actor_infer.generating_args.max_new_tokens=8"),
        violates=lambda c: (c.actor_infer.generating_args.max_new_tokens or 0) > c.response_length,
    ),
    Rule(
        id="engine-context-fits",
        fields=(f"{ENGINE}.context_length", *_ROOM),
        why="the engine would reject or cut the longest samples (it reserves a few tokens)",
        fix="leave context_length out, or write at least that many",
        wrong=("prompt_length=8", "response_length=8", f"{ENGINE}.context_length=17"),
        right=("prompt_length=8", "response_length=8", f"{ENGINE}.context_length=18"),
        violates=_context_too_short,
    ),
    Rule(
        id="engine-cache-fits",
        fields=(f"{ENGINE}.max_total_tokens", *_ROOM),
        why="the engine's cache could not hold one of the longest samples (it reserves a few tokens)",
        fix="leave max_total_tokens out, or write at least that many",
        wrong=("prompt_length=8", "response_length=8", f"{ENGINE}.max_total_tokens=17"),
        right=("prompt_length=8", "response_length=8", f"{ENGINE}.max_total_tokens=18"),
        violates=_cache_too_small,
    ),
    Rule(
        id="top-k-range",
        fields=("actor_infer.generating_args.top_k",),
        why="top_k is a number of tokens",
        fix="write -1 for all tokens, or a positive number",
        wrong=("actor_infer.generating_args.top_k=0",),
        right=("actor_infer.generating_args.top_k=-1",),
        violates=lambda c: c.actor_infer.generating_args.top_k < 1 and c.actor_infer.generating_args.top_k != -1,
    ),
    Rule(
        id="sampling-is-random",
        fields=("actor_infer.generating_args.top_k", "actor_infer.generating_args.sampling_mask"),
        why="a token sampled from a set of one is certain: no policy gradient is left, and nothing is learned",
        fix="write -1 for all tokens, or 2 or more; an evaluation has validation.val_greedy",
        wrong=("actor_infer.generating_args.top_k=1",),
        right=("actor_infer.generating_args.top_k=2",),
        violates=lambda c: c.actor_infer.generating_args.top_k == 1 and returns_kept(c),
    ),
    Rule(
        id="truncated-sampling",
        fields=(
            "actor_infer.generating_args.sampling_mask",
            "actor_infer.generating_args.top_p",
            "actor_infer.generating_args.top_k",
        ),
        why="tokens are sampled from a truncated distribution, but the trainer's log-probabilities are of the whole "
        "one, a policy that did not sample",
        fix="leave sampling_mask out, or write top_p: 1 and top_k: -1",
        depends=("actor_infer.strategy_args.strategy_name",),
        wrong=("actor_infer.generating_args={top_k: 50, sampling_mask: false}",),
        right=("actor_infer.generating_args.top_k=50",),
        violates=_whole_log_probs,
        severity="warning",
    ),
    unread(
        "sampling-mask-unread",
        "actor_infer.generating_args.sampling_mask",
        "actor_infer.generating_args.top_p",
        truncates,
        "leave it out: without top_p or top_k tokens are sampled from the whole vocabulary",
        wrong=("actor_infer.generating_args.sampling_mask=true",),
        right=("actor_infer.generating_args={sampling_mask: true, top_p: 0.9}",),
        depends=("actor_infer.generating_args.top_k",),
        severity="warning",
    ),
    Rule(
        id="vllm-coldest",
        fields=("actor_infer.generating_args.temperature", "actor_infer.strategy_args.strategy_name"),
        why=f"vLLM samples at {VLLM_COLDEST} for any lower temperature, and greedily below 1e-5",
        fix=f"write a temperature of {VLLM_COLDEST} or more",
        wrong=(_VLLM, "actor_infer.generating_args.temperature=0.001"),
        right=(_VLLM, f"actor_infer.generating_args.temperature={VLLM_COLDEST}"),
        violates=_too_cold,
    ),
    Rule(
        id="vllm-stops-at-tokens",
        fields=("actor_infer.generating_args.stop_strings", "actor_infer.strategy_args.strategy_name"),
        why="vLLM is asked for tokens without text, so it cannot find a stop string",
        fix="write stop_token_ids instead, or strategy_name: sglang",
        wrong=(_VLLM, "actor_infer.generating_args.stop_strings=[END]"),
        right=(_VLLM, "actor_infer.generating_args.stop_token_ids=[7]"),
        violates=lambda c: vllm(c) is not None and bool(c.actor_infer.generating_args.stop_strings),
    ),
    Rule(
        id="vllm-rounds-logits",
        fields=("fp32_lm_head", "actor_infer.strategy_args.strategy_name"),
        why="vLLM computes logits in bf16 here: with fp32 in the trainer alone the two sides would differ more than "
        "with bf16 in both",
        fix="write fp32_lm_head: false, or strategy_name: sglang",
        wrong=(_VLLM, "fp32_lm_head=true"),
        right=("fp32_lm_head=true",),
        violates=lambda c: c.fp32_lm_head and vllm(c) is not None,
    ),
    unread(
        "engine-batch-unread",
        "actor_infer.infer_batch_size",
        f"{ENGINE}.max_running_requests",
        lambda c: False,
        "leave it out: the engine forms its own batches, up to strategy_config.max_running_requests",
        wrong=("actor_infer.infer_batch_size=4",),
        right=("actor_train.infer_batch_size=4",),
        severity="warning",
    ),
    unread(
        "engine-dtype-unread",
        "actor_infer.model_args.dtype",
        f"{ENGINE}.dtype",
        lambda c: False,
        "write the engine's precision as strategy_config.dtype",
        wrong=("actor_infer.model_args.dtype=fp32",),
        right=(f"{ENGINE}.dtype=float32",),
    ),
    Rule(
        id="memory-share-on-cpu",
        fields=(f"{ENGINE}.mem_fraction_static", f"{ENGINE}.gpu_memory_utilization", "device_type"),
        why="a CPU engine has no device memory to share: this setting has no effect",
        fix="leave it out, and set max_total_tokens",
        wrong=("device_type=cpu", f"{ENGINE}.mem_fraction_static=0.5"),
        right=(*OWN_GPUS, f"{ENGINE}.mem_fraction_static=0.5"),
        violates=_memory_share_on_cpu,
        severity="warning",
    ),
)
