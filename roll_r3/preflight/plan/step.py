"""Samples, tokens and micro-batches of one step, if every sample has the maximum length."""

from __future__ import annotations

from dataclasses import dataclass

from roll_r3.batch.token_map import round_up
from roll_r3.config.derived import (
    ModelWorker,
    data_parallel_size,
    filters_groups,
    infer_batch_size,
    infer_budget,
    layout,
    longest_sequence,
    mini_batch_size,
    needs_old_log_probs,
    runs_megatron,
    token_alignment,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.workers import ActorTrainConfig


@dataclass(frozen=True)
class Step:
    """Training step: a rollout and the updates on it."""

    prompts: int
    samples: int
    longest: int
    """Maximum tokens of a sample, prompt and response."""
    tokens: int
    """Tokens of all samples together."""
    epochs: int
    optimizer_steps: int
    samples_per_optimizer_step: int
    most_prompts: int
    """Largest number sampled for the step, under a filter of groups or with additional prompts."""

    @classmethod
    def of(cls, config: RLVRConfig) -> Step:
        """Return the step of a configuration. Its samples must divide."""
        longest, samples, mini_batch = longest_sequence(config), config.samples_per_step, mini_batch_size(config)
        rounds = config.filter_groups.max_num_gen_batches if filters_groups(config) else 1
        return cls(
            prompts=config.rollout_batch_size,
            samples=samples,
            longest=longest,
            tokens=samples * longest,
            epochs=config.ppo_epochs,
            optimizer_steps=config.ppo_epochs * samples // mini_batch,
            samples_per_optimizer_step=mini_batch,
            most_prompts=config.rollout_batch_size * rounds + config.max_additional_running_prompts,
        )


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of one data-parallel rank."""

    tokens: int
    """Maximum in one micro-batch, padding included, over all its context-parallel ranks."""
    number: int
    """Number in an optimizer step, or in the whole pass without gradients."""
    budgeted: bool
    """True for a token budget: shorter samples make fewer micro-batches."""


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of a role in a step."""

    samples: int
    """Number of samples of a data-parallel rank."""
    infer: MicroBatches | None
    """Log-probabilities without gradients; None if the update computes them (see `needs_old_log_probs`)."""
    train: MicroBatches | None
    """None if the role does not train."""

    @classmethod
    def of(cls, config: RLVRConfig, worker: ModelWorker) -> Passes:
        """Return the passes of a role."""
        alignment = token_alignment(worker)
        longest = round_up(longest_sequence(config) - 1, alignment)
        samples = config.samples_per_step // data_parallel_size(worker)
        multiple = 1
        if runs_megatron(worker) and layout(worker).chunks_per_stage:
            # the interleaved schedule needs a multiple of the number of stages
            multiple = layout(worker).pipeline_model_parallel_size

        def cut(number: int, size: int, budget: int | None) -> MicroBatches:
            held = size if budget is None else budget // longest
            needed = -(-number // held)
            tokens = min(held, number) * longest if budget is None else min(budget, number * longest)
            return MicroBatches(tokens, round_up(needed, multiple), budget is not None)

        train = None
        if isinstance(worker, ActorTrainConfig):
            args = worker.training_args
            size = args.per_device_train_batch_size
            train = cut(size * args.gradient_accumulation_steps, size, worker.max_tokens_per_microbatch_in_train)
            if not needs_old_log_probs(config, config.samples_per_step):
                return cls(samples, None, train)
        return cls(samples, cut(samples, infer_batch_size(config, worker), infer_budget(config, worker)), train)
