"""Evaluation: ROLL's section `validation` and the settings beside it."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.key_rows import ByStep, Row, Step, Unread, under

_TRAINED = "actor_train.data_args"
_DATA, _SAMPLING = "validation.data_args", "validation.generating_args"
_COLUMNS = ("messages", "prompt", "ground_truth", "domain", "id", "system_prompt", "chat_template_kwargs")
"""Settings of prompts: in ROLL those of training, for evaluation too."""
_LENGTHS = ("val_prompt_length", "val_sequence_length")
_OTHERS = ("eval_steps", "val_batch_size", "val_greedy", "val_n_sample")


def evaluates(draft: Draft) -> bool:
    """Return true if a file of ROLL has prompts to evaluate."""
    return draft.get(f"{_DATA}.file_name") not in (ABSENT, None, "", [])


def _is_empty(node: object) -> bool:
    """Return true for null, and for sections without any other value."""
    return node is None or (isinstance(node, dict) and all(map(_is_empty, node.values())))


def _validation(draft: Draft) -> None:
    if not draft.is_rolls:
        return
    if not evaluates(draft):
        if _is_empty(draft.get("validation")):
            draft.drop("validation")
        for key in ("validation", *_LENGTHS, *_OTHERS):
            draft.unread(key)
        return
    section = draft.get(_DATA)
    for name in [name for name in section if name != "file_name"]:
        draft.unread(f"{_DATA}.{name}")
    for name in _COLUMNS:
        if draft.has(f"{_TRAINED}.{name}"):
            draft.put(f"{_DATA}.{name}", draft.get(f"{_TRAINED}.{name}"), f"{_TRAINED}.{name}")
    _samples(draft)
    _lengths(draft)
    for key in _OTHERS[1:]:
        draft.unread(key)


def _samples(draft: Draft) -> None:
    path = f"{_SAMPLING}.num_return_sequences"
    if draft.get(path) in (1, None):
        draft.drop(path)
    elif draft.get(path) is not ABSENT:
        draft.translate(path, {"validation.val_n_sample": draft.get(path)}, "responses per prompt")


def _lengths(draft: Draft) -> None:
    """Translate the longest response: ROLL takes it from lengths of the whole, by default training's."""
    prompt, whole = (draft.get(key) for key in _LENGTHS)
    draft.unread(f"{_SAMPLING}.max_new_tokens", empty=(None, draft.get("response_length")))
    if isinstance(prompt, int) and isinstance(whole, int) and whole > prompt:
        draft.drop(_LENGTHS[0])
        why = "in ROLL it is the prompt and the response"
        draft.translate(_LENGTHS[1], {f"{_SAMPLING}.max_new_tokens": whole - prompt}, why)
    else:
        for key in _LENGTHS:
            draft.unread(key)


STEPS: tuple[Step, ...] = (_validation,)

ROWS = (
    Row(
        "validation",
        ByStep(
            "the same, with the columns of `actor_train.data_args`, as in ROLL; dropped without prompts. Prompts are "
            "as long as training's"
        ),
    ),
    Row("eval_steps", ByStep("the same; no effect without `validation`")),
    Row(under(_DATA, "file_name"), ByStep("the same; each file is a set of its own")),
    Row(under(_SAMPLING, "num_return_sequences"), ByStep("`validation.val_n_sample`")),
    Row(
        (*_LENGTHS, f"{_SAMPLING}.max_new_tokens"),
        ByStep(
            "the longest response of evaluation, by default training's: `validation.generating_args.max_new_tokens`"
        ),
    ),
    Row("val_batch_size val_greedy val_n_sample", ByStep("no effect: not read by ROLL's RLVR pipeline")),
    Row(
        under(
            "validation",
            "name worker_cls model_args training_args strategy_args device_mapping world_size num_gpus_per_worker "
            "infer_batch_size system_envs eval_steps",
        ),
        Unread("the rollout's engines evaluate"),
    ),
)
