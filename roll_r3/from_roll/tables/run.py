"""Run: names, steps, saving, tracking, machines."""

from __future__ import annotations

from roll_r3.config.findings.report import ABSENT
from roll_r3.config.tree import Keys
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.includes import DEEPSPEED
from roll_r3.from_roll.key_rows import ByStep, Custom, Row, Same, Step, Unread, Unsupported

_ROLLOUT_LOOP = "roll.distributed.scheduler.user_defined_rollout_loop.UserDefinedRolloutLoop"


_ROLLS_ADDITIONAL = 16
"""ROLL's default number of additional prompts."""


def _blocks(draft: Draft) -> None:
    """Drop blocks defined by DeepSpeed's includes."""
    for name in [key for key in draft.data if DEEPSPEED.fullmatch(key)]:
        draft.drop((name,))


def _lengths(draft: Draft) -> None:
    """Translate sequence_length: in ROLL it is prompt plus response, and replaces response_length."""
    whole, prompt = draft.get("sequence_length"), draft.get("prompt_length")
    prompt = 1024 if prompt is ABSENT else prompt
    if whole is None:
        draft.drop("sequence_length")
    elif isinstance(whole, int) and isinstance(prompt, int) and not isinstance(whole, bool) and whole > prompt:
        draft.drop("response_length")
        why = "in ROLL it is prompt_length + response_length, and response_length is ignored"
        draft.translate("sequence_length", {"response_length": whole - prompt}, why)


_SWITCHES = ("is_use_additional_prompts", "use_additional_prompts")
_ADDITIONAL = "max_additional_running_prompts"


def _additional_prompts(draft: Draft) -> None:
    """Translate ROLL's switch for additional prompts, and their number."""
    on = [key for key in _SWITCHES if draft.get(key) is True]
    for key in _SWITCHES:
        if draft.get(key) in (False, None):
            draft.drop(key)
    if on:
        given = draft.get(_ADDITIONAL)
        number = _ROLLS_ADDITIONAL if given is ABSENT else given
        for key in on:
            draft.translate(key, {_ADDITIONAL: number}, "the step takes the first groups that finish")
    elif draft.is_rolls:
        draft.unread(_ADDITIONAL)


def _resume(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value in (None, "") or value is False:
        draft.drop(keys)
    elif value is True:
        draft.translate(keys, {"resume_from_checkpoint": "auto"}, "true means the newest checkpoint of the experiment")
    elif keys != ("resume_from_checkpoint",):
        draft.refuse(keys, "write resume_from_checkpoint: auto")


def _checkpoint_config(draft: Draft, keys: Keys) -> None:
    """Remove the type of storage from checkpoint_config; reject all but a file system."""
    value = draft.get(keys)
    if value is None:
        draft.drop(keys)
    elif isinstance(value, dict) and (kind := value.get("type", "file_system")) not in ("file_system", None):
        draft.refuse((*keys, "type"), f"checkpoints are written to a file system, not to {kind}")
    elif isinstance(value, dict):
        draft.drop((*keys, "type"))


def _mock(draft: Draft, keys: Keys) -> None:
    value = draft.get(keys)
    if value is None or (isinstance(value, dict) and value.get("enable", False) is False):
        draft.drop(keys)
        draft.keep_unknown(keys, value, ("enable", "mode", "dump_dir"))
    else:
        draft.refuse(keys, "rollouts are neither dumped nor replaced by recorded ones")


STEPS: tuple[Step, ...] = (_blocks, _lengths, _additional_prompts)

ROWS = (
    Row(
        (
            "exp_name seed output_dir pretrain max_steps rollout_batch_size num_return_sequences_in_group "
            "prompt_length response_length save_steps max_ckpt_to_keep"
        ),
        Same(),
    ),
    Row("sequence_length", ByStep("`response_length`, after subtracting `prompt_length`")),
    Row("defaults", ByStep("see [above](#other-pipelines-and-includes)")),
    Row(
        "checkpoint_config",
        Custom(
            _checkpoint_config,
            "the same, with `type: file_system`; `output_dir` gains the run's name, in ROLL the start time",
        ),
    ),
    Row(
        "resume_from_checkpoint auto_resume",
        Custom(_resume, "`resume_from_checkpoint`; `true` is `auto`; paths are of roll_r3's checkpoints"),
    ),
    Row(
        "model_download_type",
        Unread("pretrain is a Hugging Face name or a directory: download others first"),
    ),
    Row(
        "async_generation_ratio",
        Unsupported((0,), "sampling never runs ahead of training"),
    ),
    Row(
        "is_use_additional_prompts use_additional_prompts max_additional_running_prompts",
        ByStep(
            "`max_additional_running_prompts`, 16 by default; without the switch it has no effect. Prompts beyond "
            "those that the step lacks; ROLL keeps at least this many running"
        ),
    ),
    Row("user_defined_rollout_loop_cls", Unsupported((_ROLLOUT_LOOP,), "the rollout loop cannot be replaced")),
    Row("rollout_mock", Custom(_mock, "`enable: false` only")),
    Row("hydra", Unread("the file is read without Hydra")),
    Row(
        "num_gpus_per_node",
        Same("for checks before the start; devices follow the cluster"),
    ),
    Row("num_nodes local_rank", Unread("device mappings select devices")),
    Row(
        ("logging_dir logging_steps base_dir rollout_dump_dir save_logging_board_dir dump_run_name otlp_output_dir"),
        Unread("all output is under output_dir/exp_name"),
    ),
    Row(
        "profiler_timeline profiler_memory profiler_output_dir report_length_and_rewards length_profiler_dir",
        Unread("there is no profiler"),
    ),
    Row(
        (
            "max_running_requests is_num_return_sequences_expand "
            "generate_opt_level router_args rpc_timeout alive_check_interval transfer_backend"
        ),
        Unread("transport has no settings; an engine's limits are in strategy_config"),
    ),
    Row(
        "is_offload_states is_offload_optimizer_states_in_train_step offload_backend",
        Unread("no offloading: engines have their own GPUs"),
    ),
    Row(
        "reward_model reward_system_config", Unread("models of rewards are endpoints of their own, see rewards.*.judge")
    ),
    Row(
        "lora_target lora_rank lora_alpha offload_nccl",
        Unread("at the top level, only names for `${...}`"),
    ),
)
