"""Optimizer, sampling and data."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft, is_number
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Same, Step, Unread, Unsupported, under

_TRAINING = "actor_train.training_args"
_DATA = "actor_train.data_args"
_SAMPLING = "actor_infer.generating_args"
_EVALUATED = "validation.generating_args"
_ROUNDING = 1e-6


def _stop_strings(draft: Draft, keys: Keys) -> None:
    if draft.get(keys) is None:
        draft.drop(keys)


_TEMPLATES = ("native", "qwen2_5", "qwen3")
"""ROLL's templates equal to the tokenizer's own, with a generation prompt."""
_TEMPLATE = "prompts use the tokenizer's chat template: put additions of another template into the data"
_RAW_PROMPT = (
    "ROLL passes the column prompt to the model unchanged, roll_r3 through the chat template: set data_args.messages "
    "to a column of messages"
)


def _domains(draft: Draft) -> None:
    """Drop the mixture of one domain, with every prompt; write the last share as the rest, as ROLL reads it."""
    path = f"{_DATA}.domain_interleave_probs"
    shares, rewards = draft.get(path), draft.get("rewards")
    if shares is None:
        draft.drop(path)
    elif isinstance(shares, dict) and len(shares) == 1 and isinstance(rewards, dict) and set(rewards) <= set(shares):
        draft.translate(path, {}, "a single domain gets every prompt")
    elif draft.is_rolls and isinstance(shares, dict) and shares and all(map(is_number, shares.values())):
        *others, last = shares
        rest = round(1 - sum(shares[name] for name in others), 6)
        if rest >= 0 and abs(rest - shares[last]) > _ROUNDING:
            why = f"ROLL gives {last} what the other domains leave"
            draft.translate(path, {path: {**shares, last: rest}}, why)


def _columns(draft: Draft) -> None:
    """Translate `tag`, the column that selects the reward; reject `prompt`, used by ROLL without a chat template."""
    tag, messages = draft.get(f"{_DATA}.tag"), draft.get(f"{_DATA}.messages")
    if tag not in (ABSENT, None) and draft.tagged:
        draft.translate(
            f"{_DATA}.tag", {f"{_DATA}.domain": tag}, "the column with the values in rewards.*.tag_included"
        )
    else:
        draft.unread(f"{_DATA}.tag")
    if draft.is_rolls and messages in (ABSENT, None) and draft.has(f"{_DATA}.prompt"):
        draft.refuse(f"{_DATA}.prompt", _RAW_PROMPT)


def _filter(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value is None or (isinstance(value, dict) and all(item in (None, 0) for item in value.values())):
        draft.drop(keys)
    else:
        draft.refuse(keys, "filter the files")


def _group(draft: Draft) -> None:
    """Drop sampling settings that ROLL overwrites with numbers of the run."""
    for key, of_run in (
        ("num_return_sequences", "num_return_sequences_in_group"),
        ("max_new_tokens", "response_length"),
    ):
        path, value = f"{_SAMPLING}.{key}", draft.get(f"{_SAMPLING}.{key}")
        if key == "max_new_tokens" and (not draft.is_rolls or value == draft.get(of_run)):
            continue
        draft.unread(path, empty=(None, draft.get(of_run)))


def _warmup(draft: Draft) -> None:
    ratio, steps = draft.get(f"{_TRAINING}.warmup_ratio"), draft.get(f"{_TRAINING}.warmup_steps")
    if ratio in (None, 0):
        draft.drop(f"{_TRAINING}.warmup_ratio")
    elif ratio is not ABSENT and steps not in (ABSENT, None, 0):
        draft.unread(f"{_TRAINING}.warmup_ratio")
    elif ratio is not ABSENT:
        draft.refuse(f"{_TRAINING}.warmup_ratio", "write warmup_steps, in optimizer steps")


def _schedule(draft: Draft, keys: Keys) -> None:
    name = draft.get(keys)
    names = {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"}
    if isinstance(name, str) and name in names:
        draft.translate(keys, {keys: names[name]}, "warmup_steps sets the warm-up, min_lr the end of the decay")
    elif name in ("inverse-square-root", "WSD", "wsd"):
        draft.refuse(keys, "write constant, linear or cosine")


def _min_lr(draft: Draft) -> None:
    """Translate min_lr, read by ROLL with every decay."""
    path, style = f"{_TRAINING}.lr_scheduler_kwargs", draft.get(f"{_TRAINING}.lr_scheduler_type")
    given = draft.get(path)
    if given in (None, {}):
        draft.drop(path)
    elif not isinstance(given, dict) or set(given) != {"min_lr"}:
        if given is not ABSENT:
            draft.refuse(path, "the rate rises from 0 to learning_rate, then stays or decays to min_lr")
    elif style in ("constant", "constant_with_warmup"):
        draft.unread(path)
    else:
        draft.translate(path, {f"{_TRAINING}.min_lr": given["min_lr"]}, "rate at the end of the decay")


_IMPLIED = "do_sample max_length length_penalty logprobs include_stop_str_in_output seed"

STEPS: tuple[Step, ...] = (_domains, _columns, _group, _warmup, _min_lr)

ROWS = (
    Row(
        under(
            _TRAINING,
            "learning_rate weight_decay adam_beta1 adam_beta2 per_device_train_batch_size gradient_accumulation_steps",
        ),
        Same(),
    ),
    Row(
        under(_TRAINING, "lr_scheduler_type"),
        Custom(
            _schedule,
            "the same for `constant`, `linear` and `cosine`; `constant_with_warmup` is `constant`, "
            "`cosine_with_min_lr` is `cosine`",
        ),
    ),
    Row(
        under(_TRAINING, "lr_scheduler_kwargs"),
        ByStep("`min_lr` is `training_args.min_lr`, without effect under `constant`; others are not supported"),
    ),
    Row(under(_TRAINING, "warmup_steps"), Same("ROLL's first rate is 0, here one share")),
    Row(under(_TRAINING, "warmup_ratio"), ByStep("not supported without `warmup_steps`, except `0`")),
    Row(
        under(
            _TRAINING,
            "num_train_epochs max_steps output_dir seed data_seed dataloader_num_workers fp16 bf16 tf32",
        ),
        Unread("ROLL takes them from max_steps, output_dir, seed and model_args.dtype"),
    ),
    Row(under(_TRAINING, "save_hf_model"), Unread("save_hf_steps writes weights for transformers")),
    Row(under(_SAMPLING, "temperature top_p top_k") + under(_EVALUATED, "temperature top_p top_k"), Same()),
    Row(
        under(_SAMPLING, "stop_strings") + under(_EVALUATED, "stop_strings"),
        Custom(_stop_strings, "the same; `null`: none"),
    ),
    Row(under(_SAMPLING, "max_new_tokens"), ByStep("no effect: ROLL uses `response_length`, the default here")),
    Row(
        under(_SAMPLING, "num_return_sequences"),
        ByStep("no effect: ROLL uses `num_return_sequences_in_group`"),
    ),
    Row(under(_SAMPLING, "num_beams") + under(_EVALUATED, "num_beams"), Unsupported((1,), "responses are sampled")),
    Row(
        under(_SAMPLING, "repetition_penalty") + under(_EVALUATED, "repetition_penalty"),
        Unsupported((1,), "the trainer's probabilities have no such penalty"),
    ),
    Row(
        under(_SAMPLING, "extra_args") + under(_EVALUATED, "extra_args"),
        Unsupported(({},), "sampling has temperature, top_p and top_k only"),
    ),
    Row(
        under(_SAMPLING, _IMPLIED) + under(_EVALUATED, _IMPLIED),
        Unread("unread by ROLL's engines, or implied by other settings"),
    ),
    Row(under(_DATA, "file_name id messages"), Same()),
    Row(under(_DATA, "prompt"), ByStep(f"not supported alone: {_RAW_PROMPT}")),
    Row(under(_DATA, "tag"), ByStep(f"`{_DATA}.domain`; no effect if no reward has `tag_included`")),
    Row(
        under(_DATA, "domain_interleave_probs"),
        ByStep("the same, with the last share as the rest; no effect for one domain"),
    ),
    Row(f"{_DATA}.template global_template", Unsupported(_TEMPLATES, _TEMPLATE)),
    Row("tag_to_template", Unsupported(({},), _TEMPLATE)),
    Row(
        under(_DATA, "enable_thinking"),
        Unsupported(
            (True,), "write data_args.chat_template_kwargs: {enable_thinking: false}, for a template with this variable"
        ),
    ),
    Row("dataset_filter", Custom(_filter, "not supported unless empty: filter the files")),
    Row(
        under(
            _DATA,
            "response dataset_dir dataset_type interleave_probs preprocessing_num_workers cache_path "
            "eval_file_name rollout_dataloader_num_workers rollout_dataloader_batch_size",
        ),
        Unread("unread in ROLL's RLVR pipeline, or about speed; answers are in ground_truth"),
    ),
    Row(
        under(
            _DATA,
            "image_folder video_folder audio_folder image_max_pixels image_min_pixels custom_data_kwargs_func "
            "video_max_pixels video_min_pixels video_total_pixels video_fps video_max_frames video_resize_chunk_frames",
        ),
        Unsupported((), "prompts are text: no images, video or sound"),
    ),
    Row("vlm_filter", Unread("read by pipelines with images only")),
)
