"""The run as a whole: names, steps, saving, tracking, machines."""

from __future__ import annotations

from roll_r3.config.report import ABSENT
from roll_r3.config.roll_yaml.draft import Draft
from roll_r3.config.roll_yaml.includes import DEEPSPEED
from roll_r3.config.roll_yaml.rows import By, Joint, Off, Row, Same, Step, Unread
from roll_r3.config.tree import Keys

_ROLLOUT_LOOP = "roll.distributed.scheduler.user_defined_rollout_loop.UserDefinedRolloutLoop"


def _blocks(draft: Draft) -> None:
    """What DeepSpeed's includes define; Hydra's list itself, if nobody looked at it."""
    for name in [key for key in draft.data if DEEPSPEED.fullmatch(key)]:
        draft.drop((name,))


def _lengths(draft: Draft) -> None:
    """ROLL's sequence_length is prompt and response together, and goes before response_length."""
    whole, prompt = draft.get("sequence_length"), draft.get("prompt_length")
    prompt = 1024 if prompt is ABSENT else prompt
    if whole is None:
        draft.drop("sequence_length")
    elif isinstance(whole, int) and isinstance(prompt, int) and not isinstance(whole, bool) and whole > prompt:
        draft.drop("response_length")
        why = "ROLL takes it for prompt_length + response_length, whatever response_length says"
        draft.translate("sequence_length", {"response_length": whole - prompt}, why)


def _resume(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value in (None, "") or value is False:
        draft.drop(keys)
    elif value is True:
        draft.translate(keys, {"resume_from_checkpoint": "auto"}, "true is the newest checkpoint of the experiment")
    elif keys != ("resume_from_checkpoint",):
        draft.refuse(keys, "write resume_from_checkpoint: auto")


def _keep(draft: Draft, keys: Keys) -> None:
    """ROLL's checkpoint_config: what it is stored by, and where."""
    value = draft.get(keys)
    if value is None:
        draft.drop(keys)
    elif isinstance(value, dict) and (kind := value.get("type", "file_system")) not in ("file_system", None):
        draft.refuse((*keys, "type"), f"checkpoints are written to a file system, not by {kind}")
    elif isinstance(value, dict):
        draft.drop((*keys, "type"))


def _tracker(draft: Draft, keys: Keys) -> None:
    name = draft.get(keys)
    if name == "tensorboard":
        draft.translate(keys, {keys: ["tensorboard"]}, "it is a list")
    elif name == "stdout":
        draft.translate(keys, {keys: []}, "progress is always shown, and metrics.jsonl always written")
    elif isinstance(name, str) and draft.is_rolls:
        draft.unread(keys)  # in a file of our own the models say what there is


def _mock(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value is None or (isinstance(value, dict) and value.get("enable", False) is False):
        draft.drop(keys)
        draft.keep_unknown(keys, value, ("enable", "mode", "dump_dir"))
    else:
        draft.refuse(keys, "rollouts are neither dumped nor replaced by recorded ones")


STEPS: tuple[Step, ...] = (_blocks, _lengths)

ROWS = (
    Row(
        (
            "exp_name",
            "seed",
            "output_dir",
            "pretrain",
            "max_steps",
            "rollout_batch_size",
            "num_return_sequences_in_group",
            "prompt_length",
            "response_length",
            "save_steps",
            "max_ckpt_to_keep",
        ),
        Same(),
    ),
    Row(("sequence_length",), Joint("`response_length`: less `prompt_length`, as ROLL reads it")),
    Row(("defaults",), Joint("`deepspeed_zero*` and `*envs*` are known by name; paste what another include says")),
    Row(
        ("track_with",),
        By(
            _tracker,
            "`track_with: [tensorboard]`; `stdout` is `[]`; of others nothing is read: curves go to TensorBoard",
        ),
    ),
    Row(
        ("checkpoint_config",),
        By(
            _keep,
            "the same; `type: file_system` is the only one. ROLL adds the time of the start to `output_dir`, here the "
            "run's name is within it",
        ),
    ),
    Row(
        ("resume_from_checkpoint", "auto_resume"),
        By(_resume, "`resume_from_checkpoint`: `true` is `auto`; a path names a checkpoint that roll_r3 wrote"),
    ),
    Row(
        ("system_envs",),
        Off(({},), "set them in the shell that starts the run, and before `ray start` on other nodes"),
    ),
    Row(
        ("model_download_type",),
        Off(("HUGGINGFACE_HUB",), "pretrain is a Hugging Face name or a directory; download the model first"),
    ),
    Row(
        ("async_generation_ratio",),
        Off((0,), "sampling never runs ahead of training: a step samples with its own weights"),
    ),
    Row(
        ("is_use_additional_prompts", "use_additional_prompts"),
        Off((False,), "every prompt of a step is trained on, not those that finish first"),
    ),
    Row(("user_defined_rollout_loop_cls",), Off((_ROLLOUT_LOOP,), "the rollout loop cannot be replaced")),
    Row(("rollout_mock",), By(_mock, "not supported, unless `enable: false`")),
    Row(("hydra",), Unread("the file is read without Hydra")),
    Row(
        ("num_gpus_per_node",),
        Same("for checks before the start: devices are placed where the cluster has them"),
    ),
    Row(("num_nodes", "local_rank"), Unread("the device mappings say what is used")),
    Row(
        (
            "validation",
            "eval_steps",
            "val_batch_size",
            "val_prompt_length",
            "val_sequence_length",
            "val_greedy",
            "val_n_sample",
        ),
        Unread("there is no validation yet, and training does not depend on it"),
    ),
    Row(
        (
            "tracker_kwargs",
            "logging_dir",
            "logging_steps",
            "base_dir",
            "rollout_dump_dir",
            "save_logging_board_dir",
            "dump_run_name",
            "otlp_output_dir",
        ),
        Unread("everything is written under output_dir/exp_name, metrics and samples in every step"),
    ),
    Row(
        (
            "profiler_timeline",
            "profiler_memory",
            "profiler_output_dir",
            "report_length_and_rewards",
            "length_profiler_dir",
        ),
        Unread("there is no profiler"),
    ),
    Row(
        (
            "max_running_requests",
            "max_additional_running_prompts",
            "is_num_return_sequences_expand",
            "generate_opt_level",
            "router_args",
            "rpc_timeout",
            "alive_check_interval",
            "transfer_backend",
        ),
        Unread("how requests and batches travel is not set here; an engine's limits are in its strategy_config"),
    ),
    Row(
        ("is_offload_states", "is_offload_optimizer_states_in_train_step", "offload_backend"),
        Unread("nothing is offloaded: engines have GPUs of their own"),
    ),
    Row(("reward_model", "reward_system_config"), Unread("only reward workers that are not supported use them")),
    Row(
        ("lora_target", "lora_rank", "lora_alpha", "offload_nccl"),
        Unread("at the top level they are names for `${...}` only"),
    ),
)
