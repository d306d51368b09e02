"""Summary of a valid configuration in a few lines."""

from __future__ import annotations

from roll_r3.config.derived import (
    ModelWorker,
    checkpoint_of,
    data_parallel_size,
    engine_size,
    filters_groups,
    layout,
    model_workers,
    runs_megatron,
)
from roll_r3.config.findings.report import Origins
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.devices import shared_with_engines
from roll_r3.config.sections import ValidationConfig
from roll_r3.preflight.surroundings import Surroundings


def summary(config: RLVRConfig, origins: Origins, surroundings: Surroundings) -> str:
    """Return the summary of a run, and the model as known to the check."""
    only = ", on CPU slots only" if config.device_type == "auto" and shared_with_engines(config) else ""
    lines = [
        f"valid{only}: {origins.headline or origins.file}",
        f"  {config.exp_name}: {config.max_steps} steps of {config.rollout_batch_size} prompts x "
        f"{config.num_return_sequences_in_group} samples",
        f"  model: {_model(config, surroundings)}",
        f"  router replay: {config.actor_train.router_replay.mode}",
        f"  algorithm: {_algorithm(config)}",
    ]
    if prompts := _prompts(config):
        lines.append(f"  prompts: {prompts}")
    lines.append(f"  rewards: {_rewards(config)}")
    for role, worker in model_workers(config).items():
        shown = " ".join(f"{name} {size}" for name, size in _sizes(worker).items() if size is not None and size > 1)
        what = f"  {role}: {worker.strategy_args.strategy_name}, devices {len(worker.device_mapping)}"
        lines.append(f"{what}, {shown}" if shown else what)
    engine = config.actor_infer
    engines = len(engine.device_mapping) // engine_size(config)
    lines.append(
        f"  actor_infer: {engine.strategy_args.strategy_name}, devices {len(engine.device_mapping)}, engines {engines}"
    )
    if config.validation is not None:
        lines.append(f"  evaluation: {_evaluation(config, config.validation)}")
    return "\n".join(lines)


def _algorithm(config: RLVRConfig) -> str:
    """Return estimator and loss, with the KL terms and corrections that are on."""
    correction = config.rollout_correction
    parts = {
        config.adv_estimator: True,
        config.pg_variant: True,
        "one ratio a sample": config.importance_sampling == "seq",
        "KL in the loss": config.use_kl_loss,
        "KL in the reward": config.add_token_level_kl,
        f"weights by {correction.is_weight}": correction.is_weight is not None,
        "filters of mismatch": bool(correction.filters),
        "off-policy masking": correction.opsm_delta is not None,
        "old policy of the rollout": correction.bypass,
    }
    return ", ".join(part for part, on in parts.items() if on)


def _prompts(config: RLVRConfig) -> str:
    """Return the choice of a step's prompts; empty if the next ones are taken."""
    shares = config.actor_train.data_args.domain_interleave_probs
    most = config.filter_groups.max_num_gen_batches * config.rollout_batch_size
    parts = {
        f"shares {', '.join(f'{name} {share:g}' for name, share in shares.items())}": bool(shares),
        f"groups filtered by scores, at most {most:,} sampled for a step": filters_groups(config),
        f"{config.max_additional_running_prompts} additional": config.max_additional_running_prompts > 0,
    }
    return "; ".join(part for part, on in parts.items() if on)


def _rewards(config: RLVRConfig) -> str:
    """Return the rules, with weights other than 1."""
    return ", ".join(
        f"{name} ({rule.reward}{'' if rule.weight == 1 else f' x {rule.weight:g}'})"
        for name, rule in config.rewards.items()
    )


def _evaluation(config: RLVRConfig, validation: ValidationConfig) -> str:
    moments = [
        "at the start" if validation.eval_at_start else "",
        f"every {config.eval_steps} steps" if config.eval_steps else "",
        "at the end",
    ]
    responses = "one greedy sample" if validation.val_greedy else f"{validation.val_n_sample} samples"
    return f"{', '.join(filter(None, moments))}; {responses} of each prompt"


def _sizes(worker: ModelWorker) -> dict[str, int | None]:
    """Return the sizes of a role's parallel groups."""
    data = {"DP": data_parallel_size(worker)}
    if not runs_megatron(worker):
        return {**data}
    m = layout(worker)
    return {
        "TP": m.tensor_model_parallel_size,
        "PP": m.pipeline_model_parallel_size,
        "VPP": m.chunks_per_stage,
        "EP": m.expert_model_parallel_size,
        "CP": m.context_parallel_size,
        **data,
    }


def _model(config: RLVRConfig, surroundings: Surroundings) -> str:
    name = checkpoint_of(config, "actor_train")
    model = surroundings.models.get(name)
    if model is None or model.facts is None:
        return f"{name}, not known on this machine"
    facts = model.facts
    return (
        f"{name}, {len(facts.moe_layers)} MoE layers of {facts.num_layers}, top-{facts.top_k} of {facts.num_experts} "
        f"experts (from {model.source})"
    )
