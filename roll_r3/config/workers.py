"""The three roles: `actor_infer` samples, `actor_train` learns, `reference` is frozen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from roll_r3.config.base import Config
from roll_r3.config.devices import Devices
from roll_r3.config.strategies import Fsdp2Config, HfInferConfig, MegatronConfig, SglangConfig, VllmConfig


def _mode_from_yaml(value: Any) -> Any:
    """Take False, as YAML 1.1 reads a bare `off`, for "disable"; reject True."""
    if value is False:
        return "disable"
    if value is True:
        raise ValueError("YAML reads on/yes/true as the boolean True: write R2 or R3 (or disable)")
    return {"r2": "R2", "r3": "R3", "off": "disable"}.get(value.lower(), value) if isinstance(value, str) else value


ReplayMode = Annotated[
    Literal["disable", "R2", "R3"],
    BeforeValidator(_mode_from_yaml, json_schema_input_type=Literal["disable", "R2", "R3", "off", False]),
]


class RouterReplayConfig(Config):
    """Source of the trainer's routing decisions."""

    mode: ReplayMode = "disable"
    """disable: each side routes by itself. R3: the trainer replays the rollout engine's experts. R2: the trainer
    replays those of its own old-log-prob pass. Gate weights always come from live logits, so the router learns. The
    reference never replays."""
    audit: bool = False
    """Compare the experts used by the trainer with the recorded ones, in the first step and every `audit_every` steps
    after it. actor_train only."""
    audit_every: PositiveInt = 10
    """Steps between audits."""


class ModelArgs(Config):
    """Checkpoint of a role, and its precision."""

    model_name_or_path: str | None = None
    """Hugging Face checkpoint directory or name; default: `pretrain`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the trainer's weights and activations; with bf16 the optimizer keeps fp32 master weights. Rejected
    under `actor_infer`: the engine has its own dtype."""
    trust_remote_code: bool = False
    """Run the checkpoint's Python code: its tokenizer's, and under actor_infer its model's in SGLang or vLLM. Megatron,
    FSDP2 and hf_infer use library classes only. Only for code you trust."""


class TrainingArgs(Config):
    """The optimizer and its schedule."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment. Far smaller gradients change almost nothing, and occur in reinforcement
    learning: MiniMax-M1 used 1e-15 (arXiv 2506.13585)."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no limit."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, from its peak to min_lr over all optimizer steps of the run."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate after the run's last optimizer step, with linear and cosine. At most learning_rate."""
    max_skipped_steps: NonNegativeInt = 3
    """Number of consecutive optimizer steps skipped for a non-finite gradient or loss. A skipped step changes neither
    weights nor moments nor learning rate. One more stops the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up: step k, counted from 1, has learning_rate x k / warmup_steps. Decay starts
    after it. Megatron and transformers use (k - 1), so their first step changes nothing."""
    per_device_train_batch_size: PositiveInt = 1
    """Samples of a micro-batch, per data-parallel rank."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of an optimizer step, which has this x per_device_train_batch_size x data-parallel size samples.
    With `use_dynamic_batching_in_train` the token budget cuts the same samples."""


class GeneratingArgs(Config):
    """Sampling of responses."""

    max_new_tokens: PositiveInt | None = None
    """Longest response in tokens; default: `response_length`."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits, in the engine and in the trainer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample among the likeliest tokens with this probability together. Below 1, see
    `sampling_mask`."""
    top_k: int = -1
    """Number of most likely tokens to sample from; -1: all."""
    sampling_mask: Literal["auto"] | bool = "auto"
    """Take log-probabilities of rollout, trainer and reference over the tokens kept by top_p and top_k, as returned by
    the engine with each token; without truncation there is nothing to return. auto: where the engine can. true:
    required. false: log-probabilities of the whole distribution, so ratios are biased under truncation. With top_p
    alone the engine samples among the 2,048 likeliest tokens."""
    stop_token_ids: Annotated[tuple[NonNegativeInt, ...], Field(max_length=64)] = ()
    """Token ids to end a response, besides the checkpoint's end tokens. The response keeps the token, and it is trained
    on."""
    stop_strings: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)] = ()
    """Strings to end a response (ROLL's name), after the token that completes one. The response keeps this whole token,
    so its text may end a little after the string."""


BUNDLED_DOMAIN = "task"
"""Name of the only column of bundled tasks that `domain` can name: the task."""


class DataArgs(Config):
    """Source of the prompts."""

    file_name: str | tuple[str, ...] = ()
    """One or more .jsonl, .jsonl.gz, .json or .parquet files, patterns like `data/*.jsonl`, or `bundled:NAME` for a
    task included in roll_r3. See docs/data.md."""
    prompt: str = "prompt"
    """Column with the prompt text, the user's message in the chat template. In all column names a dot selects a field
    within a column, as in `reward_model.ground_truth`."""
    messages: str | None = None
    """Column with a list of {role, content} messages, or with JSON text of one; replaces `prompt`."""
    ground_truth: str = "ground_truth"
    """Column with the reward's reference answer: text, or a number as written in the file."""
    domain: str | None = None
    """Column to select the reward (see `rewards.*.tag_included`); for bundled tasks `task`, the name of the task.
    Default: every sample has the domain "default"."""
    domain_interleave_probs: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Share of a step's prompts for each section of `rewards`, by name; the last one gets the rest. A prompt belongs
    to the first section that scores its domain. Default: prompts as they come."""
    id: str | None = None
    """Column with a name of the prompt, for samples.jsonl; default: the file's name and the row's number."""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """System message before each row's messages. Rows with their own keep it; the terminal shows their number."""
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    """Arguments of the checkpoint's chat template, like `{enable_thinking: false}`. The template must read them."""


class SglangStrategy(Config):
    """Rollout by SGLang servers."""

    strategy_name: Literal["sglang"] = "sglang"
    """Name of the strategy."""
    strategy_config: SglangConfig = SglangConfig()
    """The server's settings."""


class VllmStrategy(Config):
    """Rollout by vLLM servers, in an environment of their own."""

    strategy_name: Literal["vllm"]
    """Name of the strategy."""
    strategy_config: VllmConfig = VllmConfig()
    """The server's settings."""


class HfInferStrategy(Config):
    """Rollout by transformers inside the actor: slow, for tests and machines without another engine."""

    strategy_name: Literal["hf_infer"]
    """Name of the strategy."""
    strategy_config: HfInferConfig = HfInferConfig()
    """The engine's settings."""


class MegatronTrainStrategy(Config):
    """Training by megatron-core."""

    strategy_name: Literal["megatron_train"] = "megatron_train"
    """Name of the strategy."""
    strategy_config: MegatronConfig = MegatronConfig()
    """Parallel layout and execution."""


class Fsdp2TrainStrategy(Config):
    """Training by transformers, with weights sharded by PyTorch's FSDP2."""

    strategy_name: Literal["fsdp2_train"]
    """Name of the strategy."""
    strategy_config: Fsdp2Config = Fsdp2Config()
    """Execution."""


class MegatronInferStrategy(Config):
    """Inference by megatron-core, for log-probabilities."""

    strategy_name: Literal["megatron_infer"] = "megatron_infer"
    """Name of the strategy."""
    strategy_config: MegatronConfig = MegatronConfig()
    """Parallel layout and execution."""


class Fsdp2InferStrategy(Config):
    """Inference by transformers under FSDP2, for log-probabilities."""

    strategy_name: Literal["fsdp2_infer"]
    """Name of the strategy."""
    strategy_config: Fsdp2Config = Fsdp2Config()
    """Execution."""


def _by_name(default: str, *others: str) -> Discriminator:
    """Return the discriminator of a role's strategies; without a name it is `default`."""

    def name_of(value: Any) -> str | None:
        name = value.get("strategy_name", default) if isinstance(value, dict) else default
        if isinstance(value, Config):
            name = dict(value)["strategy_name"]
        return name if isinstance(name, str) else None

    names = " or ".join(repr(name) for name in (default, *others))
    return Discriminator(name_of, custom_error_type="strategy_name", custom_error_message=f"Input should be {names}")


RolloutArgs = Annotated[
    Annotated[SglangStrategy, Tag("sglang")]
    | Annotated[VllmStrategy, Tag("vllm")]
    | Annotated[HfInferStrategy, Tag("hf_infer")],
    _by_name("sglang", "vllm", "hf_infer"),
]
TrainArgs = Annotated[
    Annotated[MegatronTrainStrategy, Tag("megatron_train")] | Annotated[Fsdp2TrainStrategy, Tag("fsdp2_train")],
    _by_name("megatron_train", "fsdp2_train"),
]
InferArgs = Annotated[
    Annotated[MegatronInferStrategy, Tag("megatron_infer")] | Annotated[Fsdp2InferStrategy, Tag("fsdp2_infer")],
    _by_name("megatron_infer", "fsdp2_infer"),
]


class WorkerConfig(Config):
    """Settings of every role."""

    model_args: ModelArgs = ModelArgs()
    """Checkpoint and precision."""
    router_replay: RouterReplayConfig = RouterReplayConfig()
    """Routing replay of this role."""
    device_mapping: Devices = (0,)
    """Devices of this role (GPUs or CPU slots), one process each, in rank order: `list(range(0,8))`, `range(0,8)` or a
    list. Roles may share devices, except GPUs of `actor_infer`."""
    infer_batch_size: PositiveInt | None = None
    """Samples of a micro-batch in passes without gradients, per data-parallel rank; more is faster. Default:
    actor_train's per_device_train_batch_size, so that the old-log-prob pass rounds as an only optimizer step does.
    Rejected under `actor_infer`."""


class ActorInferConfig(WorkerConfig):
    """The rollout."""

    strategy_args: RolloutArgs = SglangStrategy()
    """Engine and its settings."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling settings."""


class ModelWorkerConfig(WorkerConfig):
    """Settings of a role with the model in training ranks."""

    use_dynamic_batching_in_infer: bool = False
    """Cut passes without gradients by `max_tokens_per_microbatch_in_infer` instead of `infer_batch_size`."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens of a micro-batch in a pass without gradients, with padding, over all context-parallel ranks that share it;
    default: actor_train's max_tokens_per_microbatch_in_train."""
    use_sequence_packing: bool = False
    """Join a micro-batch's samples in one row instead of padding each to the longest."""
    sequence_length_round: PositiveInt = 1
    """Pad each row (each sample of a packed row) so that every rank that shares it has a multiple of this many
    tokens."""


class ActorTrainConfig(ModelWorkerConfig):
    """The trained policy."""

    strategy_args: TrainArgs = MegatronTrainStrategy()
    """Trainer and its layout."""
    training_args: TrainingArgs = TrainingArgs()
    """Optimizer, schedule, batch sizes."""
    data_args: DataArgs = DataArgs()
    """Prompts."""
    use_dynamic_batching_in_train: bool = False
    """Cut an optimizer step's samples into micro-batches by `max_tokens_per_microbatch_in_train` instead of
    `per_device_train_batch_size`."""
    max_tokens_per_microbatch_in_train: PositiveInt | None = None
    """Tokens of a micro-batch in training, with padding, over all context-parallel ranks that share it."""


class ReferenceConfig(ModelWorkerConfig):
    """The frozen policy of the KL term. It always routes by itself."""

    strategy_args: InferArgs = MegatronInferStrategy()
    """Strategy and its layout."""
