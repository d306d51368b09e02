"""Values derived from a configuration by arithmetic: its roles, sizes of parallel groups, alignment."""

from __future__ import annotations

from dataclasses import fields, replace

from roll_r3.config.algorithm import AlgorithmConfig
from roll_r3.config.base import Config
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.sampling_settings import KEPT_LIMIT, Sampling
from roll_r3.config.sections import GroupFilter
from roll_r3.config.strategies import MegatronConfig, ServerConfig, SglangConfig, VllmConfig
from roll_r3.config.tree import join
from roll_r3.config.workers import ActorTrainConfig, GeneratingArgs, ReferenceConfig, WorkerConfig

ModelWorker = ActorTrainConfig | ReferenceConfig
DEVICES_PER_NODE = 8
"""Default number of devices per node."""
MegatronWorker = ModelWorker
"""One of `megatron_workers`, the only arguments of `layout`."""


def workers(config: RLVRConfig) -> dict[str, WorkerConfig]:
    """Return the configured roles by name."""
    roles = {"actor_train": config.actor_train, "actor_infer": config.actor_infer, "reference": config.reference}
    return {name: worker for name, worker in roles.items() if worker is not None}


def model_workers(config: RLVRConfig) -> dict[str, ModelWorker]:
    """Return the roles that run the model, by name: `actor_train`, and `reference` if configured."""
    return {n: w for n, w in workers(config).items() if isinstance(w, ActorTrainConfig | ReferenceConfig)}


def megatron_workers(config: RLVRConfig) -> dict[str, MegatronWorker]:
    """Return the roles run by Megatron, by name."""
    return {name: worker for name, worker in model_workers(config).items() if runs_megatron(worker)}


def runs_megatron(worker: ModelWorker) -> bool:
    """Return true if Megatron runs the role, so that it has a layout."""
    return isinstance(worker.strategy_args.strategy_config, MegatronConfig)


def roles_with_gpu_kernels(config: RLVRConfig) -> list[str]:
    """Return the roles with a layout that asks for GPU-only kernels."""
    layouts = {role: layout(worker) for role, worker in megatron_workers(config).items()}
    return [role for role, m in layouts.items() if m.moe_grouped_gemm or m.moe_router_fusion]


def layout(worker: MegatronWorker) -> MegatronConfig:
    """Return the parallel layout of a role run by Megatron."""
    settings = worker.strategy_args.strategy_config
    assert isinstance(settings, MegatronConfig), f"{worker.strategy_args.strategy_name} has no Megatron layout"
    return settings


def server(config: RLVRConfig) -> ServerConfig | None:
    """Return the engine's settings if it is a server of its own."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, ServerConfig) else None


def vllm(config: RLVRConfig) -> VllmConfig | None:
    """Return the engine's settings if it is vLLM."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, VllmConfig) else None


def sglang(config: RLVRConfig) -> SglangConfig | None:
    """Return the engine's settings if it is SGLang."""
    settings = config.actor_infer.strategy_args.strategy_config
    return settings if isinstance(settings, SglangConfig) else None


def truncates(config: RLVRConfig) -> bool:
    """Return true if tokens are sampled from a part of the vocabulary."""
    generating = config.actor_infer.generating_args
    return generating.top_p < 1 or generating.top_k > 0


def returns_kept(config: RLVRConfig) -> bool:
    """Return true if the engine is asked for the set of tokens that each token was sampled from (`sampling_mask`)."""
    return truncates(config) and config.actor_infer.generating_args.sampling_mask is not False


def gives_rollout_log_probs(config: RLVRConfig) -> bool:
    """Return true if the engine's log-probabilities are of the trainer's distribution.

    Without sets the trainer's are of the whole distribution at the sampling temperature. vLLM's are of the truncated
    one then: its other choice is before truncation and temperature both.
    """
    return vllm(config) is None or not truncates(config) or returns_kept(config)


def engine_size(config: RLVRConfig) -> int:
    """Return the number of devices of one rollout engine."""
    settings = server(config)
    return 1 if settings is None else settings.tp_size


def engine_devices(config: RLVRConfig) -> list[tuple[int, ...]]:
    """Return the devices of each rollout engine; if they do not divide (a rule rejects this), the last has fewer."""
    devices, size = config.actor_infer.device_mapping, engine_size(config)
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def devices_per_node(config: RLVRConfig) -> int:
    """Return the number of devices per node: device d is on node d // devices_per_node."""
    return config.num_gpus_per_node or DEVICES_PER_NODE


def checkpoint_of(config: RLVRConfig, role: str) -> str:
    """Return the checkpoint of a configured role."""
    return workers(config)[role].model_args.model_name_or_path or config.pretrain


def saving_dir(config: RLVRConfig) -> str:
    """Return the directory above the checkpoints of all experiments."""
    return config.checkpoint_config.output_dir or config.output_dir


def uses_saving_dir(config: RLVRConfig) -> bool:
    """Return true if a run writes checkpoints, or looks for them."""
    return config.save_steps > 0 or config.save_hf_steps > 0 or config.resume_from_checkpoint == "auto"


def model_parallel_size(worker: ModelWorker) -> int:
    """Return the number of ranks that share one copy of the model outside its experts: TP x PP x CP; 1 under FSDP2."""
    if not runs_megatron(worker):
        return 1
    m = layout(worker)
    return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size


def data_parallel_size(worker: ModelWorker) -> int:
    """Return the number of copies of the model; 0 if the devices do not divide (a rule rejects this)."""
    devices, ranks = len(worker.device_mapping), model_parallel_size(worker)
    return 0 if devices % ranks else devices // ranks


def expert_layout(worker: MegatronWorker) -> tuple[int, int, int]:
    """Return (ETP, EP, PP), with the default of ETP filled in."""
    m = layout(worker)
    default = 1 if m.expert_model_parallel_size > 1 else m.tensor_model_parallel_size
    return (
        m.expert_tensor_parallel_size or default,
        m.expert_model_parallel_size,
        m.pipeline_model_parallel_size,
    )


def mini_batch_size(config: RLVRConfig) -> int:
    """Return the number of samples of an optimizer step over all ranks; 0 if the devices do not divide."""
    args = config.actor_train.training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size(config.actor_train)


def infer_batch_size(config: RLVRConfig, worker: ModelWorker) -> int:
    """Return the samples of a micro-batch in a role's passes without gradients, if no token budget cuts them."""
    return worker.infer_batch_size or config.actor_train.training_args.per_device_train_batch_size


def infer_budget(config: RLVRConfig, worker: ModelWorker) -> int | None:
    """Return the tokens of a micro-batch in a role's passes without gradients; None: `infer_batch_size` cuts them."""
    if not worker.use_dynamic_batching_in_infer:
        return None
    return worker.max_tokens_per_microbatch_in_infer or config.actor_train.max_tokens_per_microbatch_in_train


def optimizer_steps(config: RLVRConfig, num_samples: int) -> int:
    """Return the number of optimizer steps on `num_samples` samples, a multiple of `mini_batch_size`."""
    return config.ppo_epochs * (num_samples // mini_batch_size(config))


def forces_ratio(config: RLVRConfig, num_samples: int) -> bool:
    """Return true if the ratio is 1 by definition in a step on `num_samples` samples (`force_on_policy_ratio`).

    With `rollout_correction.bypass` it never is: the old policy is the rollout's.
    """
    if config.rollout_correction.bypass:
        return False
    if isinstance(config.force_on_policy_ratio, bool):
        return config.force_on_policy_ratio
    return optimizer_steps(config, num_samples) == 1


def needs_old_log_probs(config: RLVRConfig, num_samples: int) -> bool:
    """Return true if a step on `num_samples` samples needs the trainer's pass before the update.

    With a forced ratio only R2, to record routes, a KL penalty in the reward, the choice of tokens by their entropy and
    `rollout_correction` need it. Other readers of old log-probabilities take them from the update: its forward has the
    same weights.
    """
    if config.rollout_correction.bypass:
        return False
    recorded, by_entropy = config.actor_train.router_replay.mode == "R2", config.top_entropy_quantile < 1
    corrects = config.rollout_correction.corrects
    return recorded or by_entropy or corrects or config.add_token_level_kl or not forces_ratio(config, num_samples)


def token_alignment(worker: ModelWorker) -> int:
    """Return the alignment in tokens of rows, or of samples in a packed row (`Layout.alignment`)."""
    if not runs_megatron(worker):
        return worker.sequence_length_round
    cp = layout(worker).context_parallel_size
    return sequence_parts(worker) * (2 if cp > 1 else 1) * worker.sequence_length_round


def sequence_parts(worker: ModelWorker) -> int:
    """Return the number of ranks that split a sequence's tokens at the router."""
    if not runs_megatron(worker):
        return 1
    m = layout(worker)
    sp = 1 if m.sequence_parallel is False else m.tensor_model_parallel_size
    return sp * m.context_parallel_size


def longest_sequence(config: RLVRConfig) -> int:
    """Return the number of tokens of the longest prompt and response together."""
    return config.prompt_length + config.response_length


def sampled_tokens(config: RLVRConfig) -> int:
    """Return the number of tokens of the longest requested response."""
    return config.actor_infer.generating_args.max_new_tokens or config.response_length


def evaluated_tokens(config: RLVRConfig) -> int:
    """Return the number of tokens of the longest response in an evaluation; 0 without evaluation."""
    settings = config.validation
    return 0 if settings is None else settings.generating_args.max_new_tokens or config.response_length


def sampling(config: RLVRConfig) -> Sampling:
    """Return the settings of sampling for training."""
    found, kept = _sampling(config.actor_infer.generating_args, sampled_tokens(config)), returns_kept(config)
    return replace(found, top_k=KEPT_LIMIT if kept and found.top_k < 1 else found.top_k, return_kept=kept)


def evaluation_sampling(config: RLVRConfig) -> Sampling:
    """Return the settings of sampling for an evaluation, independent of training's."""
    settings = config.validation
    assert settings is not None, "asked for by an evaluation only"
    return _sampling(settings.generating_args, evaluated_tokens(config), greedy=settings.val_greedy)


def _sampling(generating: GeneratingArgs, max_new_tokens: int, *, greedy: bool = False) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=generating.temperature,
        top_p=generating.top_p,
        top_k=generating.top_k,
        stop_token_ids=generating.stop_token_ids,
        stop_strings=generating.stop_strings,
        greedy=greedy,
    )


def group_filter(config: RLVRConfig, section: str) -> GroupFilter:
    """Return the filter of groups whose prompts belong to a section of `rewards`."""
    own = config.rewards[section].filter_groups if section in config.rewards else None
    return config.filter_groups if own is None else own


def filters_groups(config: RLVRConfig) -> bool:
    """Return true if groups of any section are filtered."""
    return any(group_filter(config, section).enable for section in config.rewards)


def samples_at_once(settings: ServerConfig) -> int:
    """Return the number of samples that a server runs at once, as far as its settings say."""
    return min(settings.max_running_requests or settings.max_concurrent_requests, settings.max_concurrent_requests)


def engine_room(config: RLVRConfig) -> int:
    """Return the tokens needed in an engine's context and cache for the longest sample, of training or evaluation.

    SGLang reserves 2 tokens in its limit of a response, and 7 in its limit of a prompt (0.5.23: `max_req_len` and
    `max_req_input_len` of its tp_worker and scheduler).
    """
    reserved, least = (2, 7) if sglang(config) is not None else (0, 0)
    return config.prompt_length + max(max(sampled_tokens(config), evaluated_tokens(config)) + reserved, least)


def algorithm_of(config: RLVRConfig) -> AlgorithmConfig:
    """Return the settings that the algorithms read."""
    return AlgorithmConfig(**{field.name: getattr(config, field.name) for field in fields(AlgorithmConfig)})


def values_at(config: RLVRConfig, path: str) -> list[tuple[str, object]]:
    """Return (dotted path, value) of every value at `path`, with `*` for any key; none below a section that is None."""
    found: list[tuple[str, object]] = [("", config)]
    for key in path.split("."):
        above, found = found, []
        for prefix, value in above:
            items = value if isinstance(value, dict) else dict(value) if isinstance(value, Config) else {}
            names = list(items) if key == "*" else [key] if key in items else []
            found += [(join(prefix, name), items[name]) for name in names]
    return found


def changed(config: RLVRConfig, path: str) -> bool:
    """Return true if a field differs from its default. (A printed configuration gives all fields.)"""
    parent_path, _, name = path.rpartition(".")
    sections = [value for _, value in values_at(config, parent_path)] if parent_path else [config]
    fields = [
        (s, type(s).model_fields[name]) for s in sections if isinstance(s, Config) and name in type(s).model_fields
    ]
    return any(getattr(section, name) != field.default for section, field in fields)
