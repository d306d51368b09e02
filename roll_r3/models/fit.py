"""Whether a configuration fits the checkpoint: what only config.json can tell."""

from __future__ import annotations

from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.strategies import MegatronConfig
from roll_r3.errors import ConfigError
from roll_r3.models.facts import ModelFacts
from roll_r3.models.layer_map import chunk_layers


def check_fit(config: RLVRConfig, facts: ModelFacts) -> None:
    """Compare layouts and lengths with the model.

    Raises:
        ConfigError: every misfit, one a line.
    """
    found: list[str] = []
    mode = config.actor_train.router_replay.mode
    if mode != "disable" and not facts.moe_layers:
        found.append(f"actor_train.router_replay.mode: {mode}, but {config.pretrain} has no MoE layer; write disable")
    longest = config.prompt_length + config.response_length
    if longest > facts.context_length:
        found.append(
            f"prompt_length + response_length: {longest} tokens, but {config.pretrain} was made for "
            f"{facts.context_length}; make one of them shorter"
        )
    roles = {"actor_train": config.actor_train, "reference": config.reference}
    for name, role in roles.items():
        if role is not None:
            found += _layout_misfits(f"{name}.strategy_args.strategy_config", role.strategy_args.strategy_config, facts)
    if found:
        raise ConfigError("\n".join(found))


def _layout_misfits(path: str, layout: MegatronConfig, facts: ModelFacts) -> list[str]:
    found = []
    ep = layout.expert_model_parallel_size
    if facts.num_experts % ep:
        found.append(f"{path}.expert_model_parallel_size: {ep} does not divide the {facts.num_experts} experts")
    tp = layout.tensor_model_parallel_size
    if facts.num_attention_heads % tp:
        found.append(
            f"{path}.tensor_model_parallel_size: {tp} does not divide the {facts.num_attention_heads} attention heads"
        )
    try:
        chunk_layers(facts.num_layers, layout)
    except ValueError as error:
        found.append(f"{path}.{error}")
    return found
