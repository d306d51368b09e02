"""What ROLL says of a rollout engine whichever it is: its size, its precision, how weights reach it."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import Joint, Row, Step, under
from roll_r3.config.tree import Keys, dotted

_ENGINE = "actor_infer.strategy_args.strategy_config"
_TENSOR, _DEVICES = f"{_ENGINE}.tensor_parallel_size", "actor_infer.num_gpus_per_worker"
_SIZES = {"sglang": (_TENSOR, _DEVICES), "vllm": (_TENSOR,)}
"""Engine -> where ROLL looks for the devices of one. For vLLM it replaces num_gpus_per_worker."""
_DTYPES = {"fp16": "float16", "fp32": "float32"}
_STRATEGIES = ("sglang", "vllm", "hf_infer")
_SETTINGS = "<engine>.strategy_args.strategy_config"


def _size(draft: Draft) -> None:
    given = [path for path in _SIZES.get(draft.strategy("actor_infer"), ()) if draft.has(path)]
    if given:
        _take_size(draft, given[0])
    for keys in draft.expand(f"{_SETTINGS}.tensor_parallel_size") + draft.expand("<role>.num_gpus_per_worker"):
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


def _dtype(draft: Draft) -> None:
    """ROLL's engine computes in model_args.dtype, whatever its settings say."""
    if not draft.is_rolls or draft.strategy("actor_infer") not in _STRATEGIES:
        return
    for keys in draft.expand(f"{_SETTINGS}.dtype"):
        if draft.get(keys) is None:
            draft.drop(keys)
        else:
            draft.unread(keys)
    path = "actor_infer.model_args.dtype"
    name = draft.get(path)
    if isinstance(name, str) and name in _DTYPES:
        draft.translate(path, {f"{_ENGINE}.dtype": _DTYPES[name]}, "the engine's precision")


def _buckets(draft: Draft) -> None:
    path = "model_update_buffer_size_mb"
    if draft.has(path) and draft.strategy("actor_infer") in _STRATEGIES:
        draft.translate(
            path, {f"{_ENGINE}.weight_bucket_mb": draft.get(path)}, "weights go out in groups of so many MiB"
        )
    elif draft.get(path) is None:
        draft.drop(path)
    elif draft.has(path):
        draft.unread(path)


def pass_on(draft: Draft, keys: Keys, value: object) -> None:
    """Hand `value` to the engine's server under the key's own name; null is no value."""
    if draft.get(keys) is None:
        draft.drop(keys)
    else:
        draft.translate(keys, {(*keys[:-1], "server_args", keys[-1]): value}, "an argument of the engine's own")


STEPS: tuple[Step, ...] = (_size, _dtype, _buckets)

ROWS = (
    Row(
        (*under(_SETTINGS, "tensor_parallel_size"), "<role>.num_gpus_per_worker"),
        Joint(
            "`strategy_config.tp_size`; `num_gpus_per_worker` for SGLang only, where the other is not given: it has no "
            "effect for other roles and engines"
        ),
    ),
    Row(("actor_infer.model_args.dtype",), Joint("`bf16` is the default; else `strategy_config.dtype`")),
    Row(
        under(_SETTINGS, "dtype"),
        Joint("no effect in a file of ROLL's, which puts `actor_infer.model_args.dtype` in its place; else the same"),
    ),
    Row(("model_update_buffer_size_mb",), Joint("`actor_infer.strategy_args.strategy_config.weight_bucket_mb`")),
)
