"""What follows from a configuration by arithmetic: sizes of parallel groups, alignment, which roles there are."""

from __future__ import annotations

from dataclasses import fields

from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.base import Config
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig, ServerConfig, SglangConfig, VllmConfig
from roll_r3.config.tree import join
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig, WorkerConfig

ModelWorker = ActorTrainConfig | ReferenceConfig
DEVICES_PER_NODE = 8
"""Devices of a usual machine, assumed where the file does not say."""
MegatronWorker = ModelWorker
"""One of `megatron_workers`: only its `layout` may be asked for."""


def workers(config: RLVRConfig) -> dict[str, WorkerConfig]:
    """The roles that are configured, by name."""
    roles = {"actor_train": config.actor_train, "actor_infer": config.actor_infer, "reference": config.reference}
    return {name: worker for name, worker in roles.items() if worker is not None}


def model_workers(config: RLVRConfig) -> dict[str, ModelWorker]:
    """The roles whose ranks run the model, by name: `actor_train`, and `reference` where there is one."""
    return {n: w for n, w in workers(config).items() if isinstance(w, ActorTrainConfig | ReferenceConfig)}


def megatron_workers(config: RLVRConfig) -> dict[str, MegatronWorker]:
    """The roles that Megatron runs, by name."""
    return {name: worker for name, worker in model_workers(config).items() if runs_megatron(worker)}


def runs_megatron(worker: ModelWorker) -> bool:
    """Whether Megatron runs a role, so that it has a layout."""
    return isinstance(worker.strategy_args.strategy_config, MegatronConfig)


def roles_with_gpu_kernels(config: RLVRConfig) -> list[str]:
    """Roles whose layout asks for kernels that run on a GPU only."""
    layouts = {role: layout(worker) for role, worker in megatron_workers(config).items()}
    return [role for role, m in layouts.items() if m.moe_grouped_gemm or m.moe_router_fusion]


def layout(worker: MegatronWorker) -> MegatronConfig:
    """The parallel layout of a role that Megatron runs."""
    settings = worker.strategy_args.strategy_config
    assert isinstance(settings, MegatronConfig), f"{worker.strategy_args.strategy_name} has no Megatron layout"
    return settings


def server(config: RLVRConfig) -> ServerConfig | None:
    """The engine's settings, where it is a server of its own."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, ServerConfig) else None


def vllm(config: RLVRConfig) -> VllmConfig | None:
    """The engine's settings, where vLLM is the engine."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, VllmConfig) else None


def sglang(config: RLVRConfig) -> SglangConfig | None:
    """The engine's settings, where SGLang is the engine."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, SglangConfig) else None


def truncates(config: RLVRConfig) -> bool:
    """True if tokens are sampled from a part of the vocabulary."""
    generating = config.actor_infer.generating_args
    return generating.top_p < 1 or generating.top_k > 0


def gives_rollout_log_probs(config: RLVRConfig) -> bool:
    """True if the engine's log-probabilities can be compared with the trainer's.

    They are of the whole distribution at the sampling temperature. vLLM gives them before both temperature and
    truncation, or after both.
    """
    return vllm(config) is None or not truncates(config) or config.actor_infer.generating_args.temperature == 1


def engine_size(config: RLVRConfig) -> int:
    """Devices of one rollout engine."""
    settings = server(config)
    return 1 if settings is None else settings.tp_size


def engine_devices(config: RLVRConfig) -> list[tuple[int, ...]]:
    """Devices of each rollout engine; the last has fewer where they do not divide, which a rule of its own refuses."""
    devices, size = config.actor_infer.device_mapping, engine_size(config)
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def devices_per_node(config: RLVRConfig) -> int:
    """Devices of a node as far as a file says: device d is taken to be on node d // this."""
    return config.num_gpus_per_node or DEVICES_PER_NODE


def checkpoint_of(config: RLVRConfig, role: str) -> str:
    """The checkpoint that a configured role loads."""
    return workers(config)[role].model_args.model_name_or_path or config.pretrain


def saving_dir(config: RLVRConfig) -> str:
    """The directory below which every experiment's checkpoints are."""
    return config.checkpoint_config.output_dir or config.output_dir


def uses_saving_dir(config: RLVRConfig) -> bool:
    """True if a run writes checkpoints, or looks for them."""
    return config.save_steps > 0 or config.save_hf_steps > 0 or config.resume_from_checkpoint == "auto"


def model_parallel_size(worker: ModelWorker) -> int:
    """Ranks that share one copy of the model outside its experts: TP x PP x CP. Under FSDP2 every rank computes all."""
    if not runs_megatron(worker):
        return 1
    m = layout(worker)
    return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size


def data_parallel_size(worker: ModelWorker) -> int:
    """Copies of the model; 0 when the devices do not divide, which a rule of its own refuses."""
    devices, ranks = len(worker.device_mapping), model_parallel_size(worker)
    return 0 if devices % ranks else devices // ranks


def expert_layout(worker: MegatronWorker) -> tuple[int, int, int]:
    """(ETP, EP, PP), the expert-tensor-parallel default filled in."""
    m = layout(worker)
    default = 1 if m.expert_model_parallel_size > 1 else m.tensor_model_parallel_size
    return (
        m.expert_tensor_parallel_size or default,
        m.expert_model_parallel_size,
        m.pipeline_model_parallel_size,
    )


def mini_batch_size(config: RLVRConfig) -> int:
    """Samples of an optimizer step over all ranks; 0 when the layout has no data-parallel size."""
    args = config.actor_train.training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size(config.actor_train)


def infer_batch_size(config: RLVRConfig, worker: ModelWorker) -> int:
    """Samples of a micro-batch in a role's passes without gradients, where no token budget cuts them."""
    return worker.infer_batch_size or config.actor_train.training_args.per_device_train_batch_size


def infer_budget(config: RLVRConfig, worker: ModelWorker) -> int | None:
    """Tokens of a micro-batch in a role's passes without gradients; None: `infer_batch_size` cuts them."""
    if not worker.use_dynamic_batching_in_infer:
        return None
    return worker.max_tokens_per_microbatch_in_infer or config.actor_train.max_tokens_per_microbatch_in_train


def optimizer_steps(config: RLVRConfig, num_samples: int) -> int:
    """Number of a training step on so many samples, which divide into its mini-batches."""
    return config.ppo_epochs * (num_samples // mini_batch_size(config))


def forces_ratio(config: RLVRConfig, num_samples: int) -> bool:
    """True where policy / old policy is 1 by definition in a step on so many samples (`force_on_policy_ratio`)."""
    if isinstance(config.force_on_policy_ratio, bool):
        return config.force_on_policy_ratio
    return optimizer_steps(config, num_samples) == 1


def needs_old_log_probs(config: RLVRConfig, num_samples: int) -> bool:
    """True where such a step needs the trainer's pass before the update.

    Where the ratio is forced that is R2, which records routes in it, and a KL penalty in the reward. All else that
    reads old log-probabilities takes them from the update, whose forward has the same weights.
    """
    recorded = config.actor_train.router_replay.mode == "R2"
    return recorded or config.add_token_level_kl or not forces_ratio(config, num_samples)


def token_alignment(worker: ModelWorker) -> int:
    """Tokens that every row, or sample of a packed row, is padded to a multiple of: `Layout.alignment` of its ranks."""
    if not runs_megatron(worker):
        return worker.sequence_length_round
    cp = layout(worker).context_parallel_size
    return sequence_parts(worker) * (2 if cp > 1 else 1) * worker.sequence_length_round


def sequence_parts(worker: ModelWorker) -> int:
    """Ranks among which a sequence's tokens are split where they are routed."""
    if not runs_megatron(worker):
        return 1
    m = layout(worker)
    sp = 1 if m.sequence_parallel is False else m.tensor_model_parallel_size
    return sp * m.context_parallel_size


def longest_sequence(config: RLVRConfig) -> int:
    """Tokens of the longest prompt and response together."""
    return config.prompt_length + config.response_length


def sampled_tokens(config: RLVRConfig) -> int:
    """Tokens of the longest response that is asked for."""
    return config.actor_infer.generating_args.max_new_tokens or config.response_length


def engine_room(config: RLVRConfig) -> int:
    """Tokens that an engine's context, and its cache, must hold so that the longest sample comes back whole.

    SGLang keeps 2 tokens back when it limits a response, and 7 when it limits a prompt (0.5.23: `max_req_len` and
    `max_req_input_len` of its tp_worker and scheduler).
    """
    kept_back, least = (2, 7) if sglang(config) is not None else (0, 0)
    return config.prompt_length + max(sampled_tokens(config) + kept_back, least)


def algorithm_of(config: RLVRConfig) -> AlgorithmConfig:
    """Return the settings that the algorithms read."""
    return AlgorithmConfig(**{field.name: getattr(config, field.name) for field in fields(AlgorithmConfig)})


def values_at(config: RLVRConfig, path: str) -> list[tuple[str, object]]:
    """(dotted path, value) of what `path` names; `*` is every key. Empty below a section that is None."""
    found: list[tuple[str, object]] = [("", config)]
    for key in path.split("."):
        above, found = found, []
        for prefix, value in above:
            items = value if isinstance(value, dict) else dict(value) if isinstance(value, Config) else {}
            names = list(items) if key == "*" else [key] if key in items else []
            found += [(join(prefix, name), items[name]) for name in names]
    return found


def changed(config: RLVRConfig, path: str) -> bool:
    """Whether a field differs from its default. (That it was given says nothing: a printed configuration gives all.)"""
    parent_path, _, name = path.rpartition(".")
    sections = [value for _, value in values_at(config, parent_path)] if parent_path else [config]
    fields = [
        (s, type(s).model_fields[name]) for s in sections if isinstance(s, Config) and name in type(s).model_fields
    ]
    return any(getattr(section, name) != field.default for section, field in fields)
