"""Batch arithmetic: samples over ranks, optimizer steps, micro-batches, token budgets."""

from __future__ import annotations

from roll_r3.config.derived import (
    MegatronWorker,
    ModelWorker,
    data_parallel_size,
    infer_budget,
    layout,
    longest_sequence,
    mini_batch_size,
    optimizer_steps,
    runs_megatron,
    token_alignment,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.paths import BATCH, CP, EP, MEGATRON, PP, SP, TP, TRAIN, VPP
from roll_r3.config.rules.table import AnyRule, LayoutRule, RoleRule, Rule, Verdict, remainder, unread
from roll_r3.config.workers import ActorTrainConfig

TRAIN_DYNAMIC = "actor_train.use_dynamic_batching_in_train"
TRAIN_BUDGET = "actor_train.max_tokens_per_microbatch_in_train"
INFER_DYNAMIC = "use_dynamic_batching_in_infer"
INFER_BUDGET = "max_tokens_per_microbatch_in_infer"
ALIGNMENT = (TP, CP, SP, "sequence_length_round")
"""Fields read by `token_alignment`."""
RANKS = tuple(f"actor_train.{field}" for field in (TP, PP, CP))
SAMPLES = ("rollout_batch_size", "num_return_sequences_in_group")
OPTIMIZER_STEP = (f"{BATCH}.gradient_accumulation_steps", f"{BATCH}.per_device_train_batch_size")


def _samples_over_ranks(config: RLVRConfig, worker: ModelWorker) -> Verdict:
    size = data_parallel_size(worker)  # another rule rejects 0
    return remainder(config.samples_per_step, size, "data-parallel ranks") if size else False


def _samples_over_mini_batches(config: RLVRConfig) -> Verdict:
    size = mini_batch_size(config)
    if size == 0 or config.samples_per_step % data_parallel_size(config.actor_train):
        return False  # other rules reject these
    return remainder(config.samples_per_step, size, "samples of an optimizer step")


def _steps(config: RLVRConfig) -> int:
    """Return the number of optimizer steps of a training step; 0 if other rules reject the batch sizes."""
    size = mini_batch_size(config)
    return 0 if size == 0 or config.samples_per_step % size else optimizer_steps(config, config.samples_per_step)


def _warm_up_never_ends(config: RLVRConfig) -> Verdict:
    steps = config.max_steps * _steps(config)
    return f"the run has {steps}" if 0 < steps <= config.actor_train.training_args.warmup_steps else False


def _forced_over_several_steps(config: RLVRConfig) -> Verdict:
    steps = _steps(config)
    return f"a step has {steps}" if config.force_on_policy_ratio is True and steps > 1 else False


def _interleaved_micro_batches(config: RLVRConfig) -> Verdict:
    if not runs_megatron(config.actor_train):
        return False
    m = layout(config.actor_train)
    stages = m.pipeline_model_parallel_size
    if m.chunks_per_stage is None or stages < 2 or config.actor_train.use_dynamic_batching_in_train:
        return False
    return remainder(config.actor_train.training_args.gradient_accumulation_steps, stages, "pipeline stages")


def _too_small(config: RLVRConfig, worker: ModelWorker, budget: int | None) -> Verdict:
    alignment = token_alignment(worker)
    needed = -(-(longest_sequence(config) - 1) // alignment) * alignment
    return f"it takes {needed}" if budget is not None and budget < needed else False


def _infer_budget_too_small(config: RLVRConfig, worker: ModelWorker) -> Verdict:
    return _too_small(config, worker, infer_budget(config, worker))


def _train_budget_too_small(config: RLVRConfig) -> Verdict:
    worker = config.actor_train
    return worker.use_dynamic_batching_in_train and _too_small(
        config, worker, worker.max_tokens_per_microbatch_in_train
    )


def _dynamic(worker: MegatronWorker) -> bool:
    """Return true if a token budget cuts any pass of the role."""
    in_train = isinstance(worker, ActorTrainConfig) and worker.use_dynamic_batching_in_train
    return worker.use_dynamic_batching_in_infer or in_train


RULES: tuple[AnyRule, ...] = (
    RoleRule(
        id="samples-over-ranks",
        fields=(*SAMPLES, "{role}.device_mapping"),
        depends=tuple(f"{{role}}.{size}" for size in (TP, PP, CP)),
        why="the samples of a step (rollout_batch_size x num_return_sequences_in_group) must divide over the "
        "data-parallel ranks (devices / (TP x PP x CP); under FSDP2 the devices)",
        fix="change rollout_batch_size, or the number of devices",
        wrong=("actor_train.device_mapping=range(3)",),
        right=("actor_train.device_mapping=range(8)",),
        violates=_samples_over_ranks,
    ),
    Rule(
        id="samples-over-mini-batches",
        fields=(*OPTIMIZER_STEP, *SAMPLES),
        depends=("actor_train.device_mapping", *RANKS),
        why="the samples of a step must be a multiple of those of an optimizer step (per_device_train_batch_size x "
        "gradient_accumulation_steps x data-parallel size): a smaller last one would have a noisier gradient",
        fix="change one of these so that it divides",
        wrong=(f"{BATCH}.gradient_accumulation_steps=3",),
        right=(f"{BATCH}.gradient_accumulation_steps=4", f"{BATCH}.per_device_train_batch_size=16"),
        violates=_samples_over_mini_batches,
    ),
    Rule(
        id="warmup-within-run",
        fields=(f"{BATCH}.warmup_steps", "max_steps", "ppo_epochs"),
        depends=(*SAMPLES, *OPTIMIZER_STEP, "actor_train.device_mapping", *RANKS),
        why="the learning rate is still rising at the last optimizer step",
        fix="write fewer warmup_steps",
        wrong=("max_steps=1", f"{BATCH}.warmup_steps=64"),
        right=("max_steps=1", f"{BATCH}.warmup_steps=63"),
        violates=_warm_up_never_ends,
        severity="warning",
    ),
    Rule(
        id="forced-ratio-takes-one-step",
        fields=("force_on_policy_ratio", "ppo_epochs", *OPTIMIZER_STEP),
        depends=(*SAMPLES, "actor_train.device_mapping", *RANKS),
        why="policy and old policy are the same only in the first optimizer step of a training step: later ones would "
        "lose their ratio, and with it the clip",
        fix="write auto, or ppo_epochs: 1 and gradient_accumulation_steps so that one optimizer step takes all samples",
        wrong=("force_on_policy_ratio=true", f"{BATCH}.gradient_accumulation_steps=8"),
        right=("force_on_policy_ratio=true", "rollout_batch_size=2", f"{BATCH}.gradient_accumulation_steps=8"),
        violates=_forced_over_several_steps,
    ),
    Rule(
        id="min-lr-below-peak",
        fields=(f"{BATCH}.min_lr", f"{BATCH}.learning_rate"),
        why="the learning rate falls from learning_rate to min_lr: here it would rise",
        fix="write a smaller min_lr",
        wrong=(f"{BATCH}={{lr_scheduler_type: cosine, min_lr: 2.0e-6}}",),
        right=(f"{BATCH}={{lr_scheduler_type: cosine, min_lr: 1.0e-7}}",),
        violates=lambda c: c.actor_train.training_args.min_lr > c.actor_train.training_args.learning_rate,
    ),
    unread(
        "min-lr-unread",
        f"{BATCH}.min_lr",
        f"{BATCH}.lr_scheduler_type",
        lambda c: c.actor_train.training_args.lr_scheduler_type != "constant",
        "write lr_scheduler_type: linear or cosine, or leave min_lr out",
        wrong=(f"{BATCH}.min_lr=1.0e-7",),
        right=(f"{BATCH}={{lr_scheduler_type: linear, min_lr: 1.0e-7}}",),
    ),
    Rule(
        id="interleaved-micro-batches",
        fields=(f"{BATCH}.gradient_accumulation_steps", f"actor_train.{PP}", f"actor_train.{VPP}"),
        depends=(f"{TRAIN}.pipeline_model_parallel_layout", TRAIN_DYNAMIC),
        why="the interleaved schedule takes micro-batches in groups, one per pipeline stage",
        fix="write a multiple of pipeline_model_parallel_size",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{BATCH}.gradient_accumulation_steps=4",
        ),
        violates=_interleaved_micro_batches,
    ),
    Rule(
        id="train-budget-given",
        fields=(TRAIN_BUDGET, TRAIN_DYNAMIC),
        why="a token budget has an effect with dynamic batching only, and dynamic batching needs one",
        fix="write both, or neither",
        wrong=("actor_train.max_tokens_per_microbatch_in_train=4096",),
        right=("actor_train.use_dynamic_batching_in_train=true", "actor_train.max_tokens_per_microbatch_in_train=4096"),
        violates=lambda c: (
            c.actor_train.use_dynamic_batching_in_train
            != (c.actor_train.max_tokens_per_microbatch_in_train is not None)
        ),
    ),
    RoleRule(
        id="infer-budget-given",
        fields=(INFER_BUDGET, INFER_DYNAMIC),
        why="a token budget has an effect with dynamic batching only, and dynamic batching needs one",
        fix="write both, or neither",
        wrong=("actor_train.max_tokens_per_microbatch_in_infer=4096",),
        right=("actor_train.use_dynamic_batching_in_infer=true", "actor_train.max_tokens_per_microbatch_in_infer=4096"),
        violates=lambda c, w: (
            infer_budget(c, w) is None
            if w.use_dynamic_batching_in_infer
            else w.max_tokens_per_microbatch_in_infer is not None
        ),
    ),
    Rule(
        id="train-budget-fits-longest",
        depends=(TRAIN_DYNAMIC, *(f"actor_train.{field}" for field in ALIGNMENT)),
        fields=(TRAIN_BUDGET, "prompt_length", "response_length"),
        why="the longest sample (prompt_length + response_length - 1 inputs, padded for its ranks) must fit "
        "into a micro-batch",
        fix="raise the budget",
        wrong=(
            "prompt_length=8",
            "response_length=9",
            "actor_train.use_dynamic_batching_in_train=true",
            "actor_train.max_tokens_per_microbatch_in_train=15",
        ),
        right=(
            "prompt_length=8",
            "response_length=9",
            "actor_train.use_dynamic_batching_in_train=true",
            "actor_train.max_tokens_per_microbatch_in_train=16",
        ),
        violates=_train_budget_too_small,
    ),
    RoleRule(
        id="infer-budget-fits-longest",
        depends=tuple(f"{{role}}.{field}" for field in (*ALIGNMENT, INFER_DYNAMIC)),
        fields=(f"{{role}}.{INFER_BUDGET}", "prompt_length", "response_length"),
        why="the longest sample (prompt_length + response_length - 1 inputs, padded for its ranks) must fit "
        "into a micro-batch",
        fix="raise the budget",
        wrong=(
            "prompt_length=8",
            "response_length=9",
            "actor_train.use_dynamic_batching_in_infer=true",
            "actor_train.max_tokens_per_microbatch_in_infer=15",
        ),
        right=(
            "prompt_length=8",
            "response_length=9",
            "actor_train.use_dynamic_batching_in_infer=true",
            "actor_train.max_tokens_per_microbatch_in_infer=16",
        ),
        violates=_infer_budget_too_small,
    ),
    RoleRule(
        id="infer-batch-unread",
        fields=("infer_batch_size", INFER_DYNAMIC),
        why="with dynamic batching the token budget cuts micro-batches: this setting has no effect",
        fix="leave infer_batch_size out",
        wrong=(
            "actor_train.use_dynamic_batching_in_infer=true",
            "actor_train.max_tokens_per_microbatch_in_infer=4096",
            "actor_train.infer_batch_size=4",
        ),
        right=(
            "actor_train.infer_batch_size=4",
            "actor_train.use_dynamic_batching_in_train=true",
            "actor_train.max_tokens_per_microbatch_in_train=4096",
        ),
        violates=lambda _, w: w.use_dynamic_batching_in_infer and w.infer_batch_size is not None,
        severity="warning",
    ),
    LayoutRule(
        id="dynamic-batching-with-allgather",
        depends=(INFER_DYNAMIC, "use_dynamic_batching_in_train"),
        fields=("use_sequence_packing", f"{MEGATRON}.moe_token_dispatcher_type", EP),
        why="the allgather dispatcher exchanges equal shapes between expert-parallel ranks, but padded micro-batches "
        "of a token budget differ in their number of rows",
        fix="write moe_token_dispatcher_type: alltoall, or use_sequence_packing: true",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.moe_token_dispatcher_type=allgather",
            f"{TRAIN}.expert_model_parallel_size=2",
            "actor_train.use_dynamic_batching_in_train=true",
            "actor_train.max_tokens_per_microbatch_in_train=4096",
        ),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.moe_token_dispatcher_type=allgather",
            f"{TRAIN}.expert_model_parallel_size=2",
            "actor_train.use_dynamic_batching_in_train=true",
            "actor_train.max_tokens_per_microbatch_in_train=4096",
            "actor_train.use_sequence_packing=true",
        ),
        violates=lambda w: (
            _dynamic(w)
            and not w.use_sequence_packing
            and layout(w).moe_token_dispatcher_type == "allgather"
            and layout(w).expert_model_parallel_size > 1
        ),
    ),
)
