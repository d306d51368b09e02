"""What is trained on and how: the optimizer, sampling, prompts."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.rows import By, Joint, Off, Row, Same, Step, Unread, under
from roll_r3.config.tree import Keys

_TRAINING = "actor_train.training_args"
_DATA = "actor_train.data_args"
_SAMPLING = "actor_infer.generating_args"


def _stop_strings(draft: Draft, keys: Keys) -> None:
    if draft.get(keys) is None:
        draft.drop(keys)


_TEMPLATES = ("native", "qwen2_5", "qwen3")
"""Templates of ROLL's that are the tokenizer's own, with a generation prompt."""
_TEMPLATE = "prompts go through the tokenizer's own chat template; put what another template adds into the data"
_RAW_PROMPT = (
    "ROLL feeds the column prompt to the model as it is, and here it goes through the chat template as the user's "
    "message: name a column of messages in data_args.messages"
)
_MIXTURE = "prompts are drawn evenly from all files: mix the files in the proportion you want"


def _domains(draft: Draft) -> None:
    """One domain for all prompts needs no mixture."""
    path = f"{_DATA}.domain_interleave_probs"
    shares, rewards = draft.get(path), draft.get("rewards")
    if shares is None:
        draft.drop(path)
    elif isinstance(shares, dict) and len(shares) == 1 and isinstance(rewards, dict) and set(rewards) <= set(shares):
        draft.translate(path, {}, "one domain gets every prompt, with its share or without")
    elif isinstance(shares, dict):
        draft.refuse(path, _MIXTURE)


def _columns(draft: Draft) -> None:
    """ROLL's `tag` picks the reward, and its `prompt` column sees no chat template."""
    tag, messages = draft.get(f"{_DATA}.tag"), draft.get(f"{_DATA}.messages")
    if tag is None:
        draft.drop(f"{_DATA}.tag")
    elif tag is not ABSENT and draft.tagged:
        draft.translate(
            f"{_DATA}.tag", {f"{_DATA}.domain": tag}, "the column that rewards.*.tag_included names values of"
        )
    elif tag is not ABSENT:
        draft.unread(f"{_DATA}.tag")
    if draft.is_rolls and messages in (ABSENT, None) and draft.has(f"{_DATA}.prompt"):
        draft.refuse(f"{_DATA}.prompt", _RAW_PROMPT)


def _filter(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value is None or (isinstance(value, dict) and all(item in (None, 0) for item in value.values())):
        draft.drop(keys)
    else:
        draft.refuse(keys, "filter the files themselves")


def _group(draft: Draft) -> None:
    """ROLL overwrites what the rollout's sampling says about numbers that the run sets."""
    for key, of_run in (
        ("num_return_sequences", "num_return_sequences_in_group"),
        ("max_new_tokens", "response_length"),
    ):
        path, value = f"{_SAMPLING}.{key}", draft.get(f"{_SAMPLING}.{key}")
        if key == "max_new_tokens" and (not draft.is_rolls or value == draft.get(of_run)):
            continue
        if value is None or (value is not ABSENT and value == draft.get(of_run)):
            draft.drop(path)
        elif value is not ABSENT:
            draft.unread(path)


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
        draft.translate(keys, {keys: names[name]}, "warm-up is what warmup_steps says, the end of the decay min_lr")
    elif name in ("inverse-square-root", "WSD", "wsd"):
        draft.refuse(keys, "write constant, linear or cosine")


def _floor(draft: Draft) -> None:
    """Translate the floor, which ROLL reads with every decay."""
    path, style = f"{_TRAINING}.lr_scheduler_kwargs", draft.get(f"{_TRAINING}.lr_scheduler_type")
    given = draft.get(path)
    if given in (None, {}):
        draft.drop(path)
    elif not isinstance(given, dict) or set(given) != {"min_lr"}:
        if given is not ABSENT:
            draft.refuse(path, "the rate rises from 0 to learning_rate, and goes to min_lr at the end or stays")
    elif style in ("constant", "constant_with_warmup"):
        draft.unread(path)
    else:
        draft.translate(path, {f"{_TRAINING}.min_lr": given["min_lr"]}, "the rate at the end of the decay")


STEPS: tuple[Step, ...] = (_domains, _columns, _group, _warmup, _floor)

ROWS = (
    Row(
        under(
            _TRAINING,
            "learning_rate",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ),
        Same(),
    ),
    Row(
        under(_TRAINING, "lr_scheduler_type"),
        By(_schedule, "the same for `constant`, `linear` and `cosine`; `constant_with_warmup` is `constant`"),
    ),
    Row(
        under(_TRAINING, "lr_scheduler_kwargs"),
        Joint("`training_args.min_lr` for `min_lr`, no effect with `constant`; nothing else in it is supported"),
    ),
    Row(under(_TRAINING, "warmup_steps"), Same("ROLL's first step has the rate 0, here the first share")),
    Row(under(_TRAINING, "warmup_ratio"), Joint("no effect beside `warmup_steps`; else not supported, unless `0`")),
    Row(
        under(
            _TRAINING,
            "num_train_epochs",
            "max_steps",
            "output_dir",
            "seed",
            "data_seed",
            "dataloader_num_workers",
            "fp16",
            "bf16",
            "tf32",
        ),
        Unread("ROLL sets them from the run's max_steps, output_dir and seed, and from model_args.dtype"),
    ),
    Row(under(_TRAINING, "save_hf_model"), Unread("save_hf_steps says when weights are written for transformers")),
    Row(under(_SAMPLING, "temperature", "top_p", "top_k"), Same()),
    Row(under(_SAMPLING, "stop_strings"), By(_stop_strings, "the same; `null`: none")),
    Row(
        under(_SAMPLING, "max_new_tokens"), Joint("no effect: ROLL replaces it by `response_length`, the default here")
    ),
    Row(
        under(_SAMPLING, "num_return_sequences"),
        Joint("no effect: ROLL replaces it by `num_return_sequences_in_group`"),
    ),
    Row(under(_SAMPLING, "num_beams"), Off((1,), "responses are sampled")),
    Row(under(_SAMPLING, "repetition_penalty"), Off((1,), "the trainer's probabilities know no such penalty")),
    Row(under(_SAMPLING, "extra_args"), Off(({},), "sampling is temperature, top_p and top_k")),
    Row(
        under(_SAMPLING, "do_sample", "max_length", "length_penalty", "logprobs", "include_stop_str_in_output", "seed"),
        Unread("ROLL's engines do not read them, or they follow from the rest"),
    ),
    Row(under(_DATA, "file_name", "id"), Same()),
    Row(under(_DATA, "messages"), Same()),
    Row(under(_DATA, "prompt"), Joint(f"not supported without `messages`: {_RAW_PROMPT}")),
    Row(under(_DATA, "tag"), Joint(f"`{_DATA}.domain`; no effect where no reward has a `tag_included`")),
    Row(under(_DATA, "domain_interleave_probs"), Joint(f"no effect for one domain; else not supported: {_MIXTURE}")),
    Row((*under(_DATA, "template"), "global_template"), Off(_TEMPLATES, _TEMPLATE)),
    Row(("tag_to_template",), Off(({},), _TEMPLATE)),
    Row(
        under(_DATA, "enable_thinking"),
        Off((True,), "write data_args.chat_template_kwargs: {enable_thinking: false}, which the template must read"),
    ),
    Row(("dataset_filter",), By(_filter, "not supported, unless nothing in it is set: filter the files themselves")),
    Row(
        under(
            _DATA,
            "response",
            "dataset_dir",
            "dataset_type",
            "interleave_probs",
            "preprocessing_num_workers",
            "cache_path",
            "eval_file_name",
            "rollout_dataloader_num_workers",
            "rollout_dataloader_batch_size",
        ),
        Unread("ROLL's own RLVR run does not read them, or they are about speed; the answer is in column ground_truth"),
    ),
    Row(
        under(_DATA, *(f"{kind}_folder" for kind in ("image", "video", "audio")))
        + under(_DATA, "image_max_pixels", "image_min_pixels", "custom_data_kwargs_func")
        + under(_DATA, *(f"video_{name}" for name in ("max_pixels", "min_pixels", "total_pixels", "fps")))
        + under(_DATA, "video_max_frames", "video_resize_chunk_frames"),
        Off((), "prompts are text: nothing is trained on images, video or sound"),
    ),
    Row(("vlm_filter",), Unread("it belongs to pipelines with images")),
)
