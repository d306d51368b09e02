"""What follows from a configuration by arithmetic: sizes of parallel groups, alignment, which roles there are."""

from __future__ import annotations

from roll_r3.config.base import Config
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.tree import join
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig, WorkerConfig

MegatronWorker = ActorTrainConfig | ReferenceConfig


def workers(config: RLVRConfig) -> dict[str, WorkerConfig]:
    """The roles that are configured, by name."""
    roles = {"actor_train": config.actor_train, "actor_infer": config.actor_infer, "reference": config.reference}
    return {name: worker for name, worker in roles.items() if worker is not None}


def megatron_workers(config: RLVRConfig) -> dict[str, MegatronWorker]:
    """The roles that Megatron runs, by name."""
    return {n: w for n, w in workers(config).items() if isinstance(w, ActorTrainConfig | ReferenceConfig)}


def layout(worker: MegatronWorker) -> MegatronConfig:
    """The parallel layout of a role."""
    return worker.strategy_args.strategy_config


def checkpoint_of(config: RLVRConfig, role: str) -> str:
    """The checkpoint that a configured role loads."""
    return workers(config)[role].model_args.model_name_or_path or config.pretrain


def model_parallel_size(worker: MegatronWorker) -> int:
    """Ranks that share one copy of the model outside its experts: TP x PP x CP."""
    m = layout(worker)
    return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size


def data_parallel_size(worker: MegatronWorker) -> int:
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


def token_alignment(worker: MegatronWorker) -> int:
    """Tokens that every row, or sample of a packed row, is padded to a multiple of: `Layout.alignment` of its ranks."""
    m = layout(worker)
    sp = 1 if m.sequence_parallel is False else m.tensor_model_parallel_size
    cp = m.context_parallel_size
    return sp * (2 * cp if cp > 1 else 1) * worker.sequence_length_round


def longest_sequence(config: RLVRConfig) -> int:
    """Tokens of the longest prompt and response together."""
    return config.prompt_length + config.response_length


def sampled_tokens(config: RLVRConfig) -> int:
    """Tokens of the longest response that is asked for."""
    return config.actor_infer.generating_args.max_new_tokens or config.response_length


def engine_room(config: RLVRConfig) -> int:
    """Tokens that SGLang's context, and its cache, must hold so that the longest sample comes back whole.

    It keeps 2 tokens back when it limits a response, and 7 when it limits a prompt (0.5.23: `max_req_len` and
    `max_req_input_len` of its tp_worker and scheduler).
    """
    return config.prompt_length + max(sampled_tokens(config) + 2, 7)


def values_at(config: RLVRConfig, path: str) -> list[tuple[str, object]]:
    """(dotted path, value) of what `path` names; `*` is every key. Empty below a section that is None."""
    found: list[tuple[str, object]] = [("", config)]
    for key in path.split("."):
        above, found = found, []
        for prefix, value in above:
            items = value if isinstance(value, dict) else dict(value) if isinstance(value, Config) else {}
            found += [(join(prefix, name), items[name]) for name in items if key in (name, "*")]
    return found


def changed(config: RLVRConfig, path: str) -> bool:
    """Whether a field differs from its default. (That it was given says nothing: a printed configuration gives all.)"""
    parent_path, _, name = path.rpartition(".")
    sections = [value for _, value in values_at(config, parent_path)] if parent_path else [config]
    return any(getattr(s, name) != type(s).model_fields[name].default for s in sections if isinstance(s, Config))
