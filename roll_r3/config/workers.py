"""The three roles: `actor_infer` samples, `actor_train` learns, `reference` stays as it was."""

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
    """YAML 1.1 reads a bare `off` as the boolean False: take that for `disable`, refuse other booleans and say why."""
    if value is False:
        return "disable"
    if value is True:
        raise ValueError("YAML reads on/yes/true as the boolean True; write R2 or R3 (or disable)")
    return {"r2": "R2", "r3": "R3", "off": "disable"}.get(value.lower(), value) if isinstance(value, str) else value


ReplayMode = Annotated[
    Literal["disable", "R2", "R3"],
    BeforeValidator(_mode_from_yaml, json_schema_input_type=Literal["disable", "R2", "R3", "off", False]),
]


class RouterReplayConfig(Config):
    """Whose routing decisions the trainer uses."""

    mode: ReplayMode = "disable"
    """disable: each side routes by itself. R3: the trainer replays the experts that the rollout engine used. R2: the
    trainer replays those of its own old-log-prob pass. Gate weights always come from live logits, so the router
    learns. The reference never replays."""
    audit: bool = False
    """Check, in the first step and every `audit_every` steps after it, that the experts which the trainer really used
    are the recorded ones; actor_train only."""
    audit_every: PositiveInt = 10
    """Steps from one audit to the next."""


class ModelArgs(Config):
    """Which checkpoint a role loads, and how."""

    model_name_or_path: str | None = None
    """Hugging Face checkpoint directory or name; default: `pretrain`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations in the trainer; with bf16 the optimizer keeps fp32 master weights. Refused
    under `actor_infer`, whose engine has a dtype of its own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint: its tokenizer's, and under actor_infer its model's where SGLang
    or vLLM runs it. Megatron, FSDP2 and hf_infer build models by classes of their libraries alone. Leave it off unless
    you trust that code."""


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
    """Added to Adam's denominator, the root of the second moment. Gradients far below it move hardly anything, and in
    reinforcement learning they can be that small: MiniMax-M1 used 1e-15 (arXiv 2506.13585)."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate from its peak to min_lr after warm-up, over all optimizer steps of the run."""
    min_lr: NonNegativeFloat = 0.0
    """The learning rate that the decay of linear and cosine ends at, after the run's last optimizer step. At most
    learning_rate."""
    max_skipped_steps: NonNegativeInt = 3
    """Optimizer steps in a row that may be left out because their gradient or loss is not finite: nothing changes then,
    neither weights nor moments nor the learning rate. With one more the run stops; 0: at the first."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises: step k, counted from 1, has learning_rate x k / warmup_steps,
    and step warmup_steps the peak. The decay starts at the step after it. Megatron and transformers give step k the
    rate of (k - 1) / warmup_steps, so that their first step changes nothing; after warm-up they agree."""
    per_device_train_batch_size: PositiveInt = 1
    """Samples of a micro-batch, per data-parallel rank; with `use_dynamic_batching_in_train` only a factor of an
    optimizer step's samples."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of an optimizer step. Its samples: this x per_device_train_batch_size x data-parallel size. With
    `use_dynamic_batching_in_train` that is still their number, but the token budget says how they are cut."""


class GeneratingArgs(Config):
    """How responses are sampled."""

    max_new_tokens: PositiveInt | None = None
    """Longest response in tokens; default: `response_length`."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by this, in the engine and in the trainer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Log-probabilities stay those of the whole distribution, so below 1 ratios are biased."""
    top_k: int = -1
    """Sample among so many tokens; -1: all."""
    stop_token_ids: Annotated[tuple[NonNegativeInt, ...], Field(max_length=64)] = ()
    """Token ids that end a response, besides the end tokens of the checkpoint. The response keeps the token, and it is
    trained on."""
    stop_strings: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)] = ()
    """Texts that end a response (ROLL's name). Sampling ends with the token that completes one of them. The response
    keeps that token, so the text may go on a little behind the stop string."""


class DataArgs(Config):
    """Where prompts come from."""

    file_name: str | tuple[str, ...] = ()
    """One or more .jsonl, .jsonl.gz, .json or .parquet files, patterns like `data/*.jsonl`, or `bundled:NAME` for a
    task that comes with roll_r3. See docs/data.md."""
    prompt: str = "prompt"
    """Column with the prompt text (sent through the chat template as the user's message). Here and in the other columns
    a dotted name is a field within a column, as in `reward_model.ground_truth`."""
    messages: str | None = None
    """Column with a list of {role, content} messages, or with JSON text of one; takes the place of `prompt`."""
    ground_truth: str = "ground_truth"
    """Column with what the reward compares with: text, or a number as it is written in the file."""
    domain: str | None = None
    """Column that picks the reward (see `rewards.*.tag_included`); None: every sample has the domain "default"."""
    id: str | None = None
    """Column with a name for the prompt, which samples.jsonl has; None: the file's name and the row's number."""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """System message to put before each row's messages. A row with a system message keeps its own, and these rows are
    counted on the terminal."""
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    """Arguments of the checkpoint's chat template, like `{enable_thinking: false}`. The template must read them."""


class SglangStrategy(Config):
    """Rollout by SGLang servers."""

    strategy_name: Literal["sglang"] = "sglang"
    """Name of the strategy."""
    strategy_config: SglangConfig = SglangConfig()
    """The server's settings."""


class VllmStrategy(Config):
    """Rollout by vLLM servers, which have an environment of their own."""

    strategy_name: Literal["vllm"]
    """Name of the strategy."""
    strategy_config: VllmConfig = VllmConfig()
    """The server's settings."""


class HfInferStrategy(Config):
    """Rollout by transformers, inside the actor: slow and plain, for tests and for machines without another engine."""

    strategy_name: Literal["hf_infer"]
    """Name of the strategy."""
    strategy_config: HfInferConfig = HfInferConfig()
    """How it samples."""


class MegatronTrainStrategy(Config):
    """Training by megatron-core."""

    strategy_name: Literal["megatron_train"] = "megatron_train"
    """Name of the strategy."""
    strategy_config: MegatronConfig = MegatronConfig()
    """Parallel layout and execution."""


class Fsdp2TrainStrategy(Config):
    """Training by transformers, its weights shared out by PyTorch's FSDP2."""

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
    """Chooses among the strategies of a role; without a name it is the default."""

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
    """What every role declares."""

    model_args: ModelArgs = ModelArgs()
    """Checkpoint and precision."""
    router_replay: RouterReplayConfig = RouterReplayConfig()
    """Routing replay of this role."""
    device_mapping: Devices = (0,)
    """The devices (GPUs, or CPU slots where there is none) that this role runs on, one process each, in rank order.
    Roles may share devices, but no role a GPU of `actor_infer`. `list(range(0,8))`, `range(0,8)` or a list."""
    infer_batch_size: PositiveInt | None = None
    """Samples of a micro-batch in passes without gradients, per data-parallel rank; refused under `actor_infer`.
    Default: actor_train's per_device_train_batch_size. Where the pass for old log-probabilities is made, and a step has
    one optimizer step, both passes then round alike. A larger number is faster where memory allows."""


class ActorInferConfig(WorkerConfig):
    """The rollout."""

    strategy_args: RolloutArgs = SglangStrategy()
    """Which engine, and its settings."""
    generating_args: GeneratingArgs = GeneratingArgs()
    """Sampling."""


class ModelWorkerConfig(WorkerConfig):
    """What the roles that run the model in training ranks declare besides."""

    use_dynamic_batching_in_infer: bool = False
    """Cut passes without gradients by `max_tokens_per_microbatch_in_infer` instead of `infer_batch_size`."""
    max_tokens_per_microbatch_in_infer: PositiveInt | None = None
    """Tokens of one micro-batch in such a pass, padding included, over all context-parallel ranks that share it;
    default: actor_train's max_tokens_per_microbatch_in_train."""
    use_sequence_packing: bool = False
    """Put a micro-batch's samples end to end in one row instead of padding each to the longest."""
    sequence_length_round: PositiveInt = 1
    """Pad each row, or each sample of a packed row, until every rank that shares it holds a multiple of so many of its
    tokens."""


class ActorTrainConfig(ModelWorkerConfig):
    """The policy that learns."""

    strategy_args: TrainArgs = MegatronTrainStrategy()
    """Which trainer, and its layout."""
    training_args: TrainingArgs = TrainingArgs()
    """Optimizer, schedule, batch sizes."""
    data_args: DataArgs = DataArgs()
    """Prompts."""
    use_dynamic_batching_in_train: bool = False
    """Cut the samples of an optimizer step into micro-batches by `max_tokens_per_microbatch_in_train` instead of
    `per_device_train_batch_size`."""
    max_tokens_per_microbatch_in_train: PositiveInt | None = None
    """Tokens of one micro-batch in training, padding included, over all context-parallel ranks that share it."""


class ReferenceConfig(ModelWorkerConfig):
    """The frozen policy that the KL term compares with. It always routes by itself."""

    strategy_args: InferArgs = MegatronInferStrategy()
    """Which strategy, and its layout."""
