"""Settings of every rollout engine: size, precision, groups of weights."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys, dotted
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Row, Step, under

_ENGINE = "actor_infer.strategy_args.strategy_config"
_TENSOR, _DEVICES = f"{_ENGINE}.tensor_parallel_size", "actor_infer.num_gpus_per_worker"
_SIZES = {"sglang": (_TENSOR, _DEVICES), "vllm": (_TENSOR,)}
"""Engine -> keys for its number of devices, by precedence. For vLLM, ROLL overwrites num_gpus_per_worker."""
_DTYPES = {"fp16": "float16", "fp32": "float32"}
_STRATEGIES = ("sglang", "vllm", "hf_infer")
_SETTINGS = "<engine>.strategy_args.strategy_config"


def _size(draft: Draft) -> None:
    given = [path for path in _SIZES.get(draft.strategy("actor_infer"), ()) if draft.has(path)]
    if given:
        _take_size(draft, given[0])
    for keys in draft.expand(f"{_SETTINGS}.tensor_parallel_size") + draft.expand("<role>.num_gpus_per_worker"):
        if dotted(keys) not in given[:1]:
            draft.unread(keys)


def _take_size(draft: Draft, path: str) -> None:
    size = draft.get(path)
    if size == 1 and draft.get(f"{_ENGINE}.tp_size") is ABSENT:
        draft.drop(path)
    else:
        draft.translate(path, {f"{_ENGINE}.tp_size": size}, "devices of one engine")


def _dtype(draft: Draft) -> None:
    """Translate model_args.dtype: ROLL's engine computes in it, and ignores its own dtype."""
    if not draft.is_rolls or draft.strategy("actor_infer") not in _STRATEGIES:
        return
    for keys in draft.expand(f"{_SETTINGS}.dtype"):
        draft.unread(keys)
    path = "actor_infer.model_args.dtype"
    name = draft.get(path)
    if isinstance(name, str) and name in _DTYPES:
        draft.translate(path, {f"{_ENGINE}.dtype": _DTYPES[name]}, "precision of the engine")


def _buckets(draft: Draft) -> None:
    path = "model_update_buffer_size_mb"
    if draft.has(path) and draft.strategy("actor_infer") in _STRATEGIES:
        draft.translate(path, {f"{_ENGINE}.weight_bucket_mb": draft.get(path)}, "MiB per group of weights sent")
    else:
        draft.unread(path)


def pass_on(draft: Draft, keys: Keys, value: object) -> None:
    """Pass `value` to the engine's server under the key's name; drop null."""
    if draft.get(keys) is None:
        draft.drop(keys)
    else:
        draft.translate(keys, {(*keys[:-1], "server_args", keys[-1]): value}, "argument of the engine's server")


STEPS: tuple[Step, ...] = (_size, _dtype, _buckets)

ROWS = (
    Row(
        f"{_SETTINGS}.tensor_parallel_size <role>.num_gpus_per_worker",
        ByStep("`strategy_config.tp_size`; `num_gpus_per_worker` for SGLang alone, without the other"),
    ),
    Row("actor_infer.model_args.dtype", ByStep("`strategy_config.dtype`; `bf16` is the default")),
    Row(
        under(_SETTINGS, "dtype"),
        ByStep("the same, but without effect in a file of ROLL"),
    ),
    Row("model_update_buffer_size_mb", ByStep("`actor_infer.strategy_args.strategy_config.weight_bucket_mb`")),
)
