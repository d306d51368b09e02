"""What megatron cannot do, said before anything is built."""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.errors import ConfigError
from roll_r3.strategies.train.megatron.parallel import RankLayout


def check_role(config: RLVRConfig, role: str, layout: RankLayout) -> None:
    """Refuse settings of a role that cannot work together.

    Raises:
        ConfigError: naming every offending field, its value, why, and what to write instead.
    """
    section = getattr(config, role)
    settings = section.strategy_args.strategy_config
    at = f"{role}.strategy_args.strategy_config"
    found: list[str] = []
    if layout.tp_size > 1 and not layout.sequence_parallel:
        found.append(
            f"{at}.sequence_parallel is false with tensor_model_parallel_size {layout.tp_size}: MoE layers need it; "
            "leave it out or set true"
        )
    if layout.tp_size == 1 and layout.sequence_parallel:
        found.append(
            f"{at}.sequence_parallel is true with tensor_model_parallel_size 1, where there is nothing to split"
        )
    if layout.vpp_size and layout.pp_size == 1:
        found.append(
            f"{at}.virtual_pipeline_model_parallel_size is {layout.vpp_size} with pipeline_model_parallel_size 1: "
            "virtual stages need 2 or more stages"
        )
    if layout.etp_size != layout.tp_size and (layout.ep_size == 1 or layout.etp_size > layout.tp_size):
        found.append(
            f"{at}.expert_tensor_parallel_size is {layout.etp_size} with tensor_model_parallel_size {layout.tp_size} "
            f"and expert_model_parallel_size {layout.ep_size}: weights cannot be converted then; leave it out"
        )
    if settings.moe_aux_loss_coeff != 0:
        found.append(f"{at}.moe_aux_loss_coeff is {settings.moe_aux_loss_coeff}: only 0 is supported")
    if settings.moe_token_dispatcher_type == "allgather" and layout.pp_size > 1:
        found.append(
            f"{at}.moe_token_dispatcher_type is allgather with pipeline_model_parallel_size {layout.pp_size}: micro-"
            "batches of different lengths cannot pass between stages then; use alltoall"
        )
    if settings.moe_router_fusion and role == "actor_train" and section.router_replay.mode != "disable":
        found.append(
            f"{at}.moe_router_fusion is true with router_replay.mode {section.router_replay.mode}: the fused kernel "
            "never looks at recorded routes; set it to false"
        )
    if role == "actor_train":
        found += _check_steps(config, layout)
    if found:
        raise ConfigError("\n".join(found))


def steps_per_epoch(config: RLVRConfig, layout: RankLayout) -> int:
    """Optimizer steps of one pass over a step's samples."""
    args = config.actor_train.training_args
    return config.samples_per_step // (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * layout.dp_size
    )


def _check_steps(config: RLVRConfig, layout: RankLayout) -> list[str]:
    """The arithmetic of optimizer steps."""
    args, at = config.actor_train.training_args, "actor_train.training_args"
    found = []
    dynamic = config.actor_train.use_dynamic_batching_in_train
    if layout.vpp_size and args.gradient_accumulation_steps % layout.pp_size and not dynamic:
        found.append(
            f"{at}.gradient_accumulation_steps is {args.gradient_accumulation_steps}, but the interleaved schedule "
            f"(virtual_pipeline_model_parallel_size {layout.vpp_size}) needs a multiple of "
            f"pipeline_model_parallel_size {layout.pp_size}"
        )
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * layout.dp_size
    if config.samples_per_step % size:
        found.append(
            f"rollout_batch_size {config.rollout_batch_size} x num_return_sequences_in_group "
            f"{config.num_return_sequences_in_group} = {config.samples_per_step} samples do not divide into optimizer "
            f"steps of {size} ({at}.per_device_train_batch_size {args.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} x {layout.dp_size} data-parallel ranks)"
        )
        return found
    total = config.max_steps * config.ppo_epochs * steps_per_epoch(config, layout)
    if args.warmup_steps >= total:
        found.append(f"{at}.warmup_steps is {args.warmup_steps}, but the run has {total} optimizer steps: lower it")
    return found
