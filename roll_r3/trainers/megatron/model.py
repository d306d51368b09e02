"""Building megatron's model chunks on this rank from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.workers import ModelArgs
from roll_r3.errors import ConfigError
from roll_r3.trainers.megatron import bridge as weights
from roll_r3.trainers.megatron.parallel import RankLayout
from roll_r3.trainers.megatron.routers import Router, adopt_routers
from roll_r3.trainers.megatron.spec import has_transformer_engine
from roll_r3.trainers.megatron.weight_export import WeightExport

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MegatronModel:
    """This rank's part of a model."""

    chunks: list[torch.nn.Module]
    """One module, or one per virtual stage, in megatron's wrappers."""
    config: TransformerConfig
    routers: list[list[Router]]
    """Routers per chunk, in layer order."""
    vocab_size: int
    """Vocabulary size without padding to a multiple of the tensor-parallel size."""
    device: torch.device
    export: WeightExport

    def train(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    def release(self) -> None:
        """Free the memory and the process groups' threads; the model cannot be used again.

        The wrappers' gradient hooks live in autograd's graph, and modules keep pieces of this graph: a cycle invisible
        to Python's collector.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel):
                chunk.grad_accs.clear()
                del chunk.module

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightExport.tensors`."""
        return self.export.tensors()


def build_model(
    model_path: str,
    model_args: ModelArgs,
    settings: MegatronConfig,
    layout: RankLayout,
    device: torch.device,
    *,
    replays: bool,
    trains: bool,
    fp32_lm_head: bool = False,
) -> MegatronModel:
    """Build this rank's chunks and fill them from the checkpoint; collective.

    Args:
        replays: build routers with a hook for replay.
        trains: wrap the chunks for data-parallel training (see `wrap_for_training`).
        fp32_lm_head: compute logits in fp32 for any dtype of the model.

    Raises:
        ConfigError: the checkpoint cannot be built here (see `open_bridge`).
    """
    transformer_engine = has_transformer_engine(device)
    grouped = transformer_engine if settings.moe_grouped_gemm is None else settings.moe_grouped_gemm
    if grouped and not transformer_engine:
        raise ConfigError(
            "moe_grouped_gemm: true needs TransformerEngine on a GPU; leave it out to use it if it is available"
        )
    _check_recompute(settings, grouped=grouped, transformer_engine=transformer_engine)
    bridge = weights.open_bridge(
        model_path,
        dtype=DTYPES[model_args.dtype],
        tp_size=layout.tp_size,
        transformer_engine=transformer_engine,
        **_overrides(settings, layout, grouped=grouped, replays=replays, transformer_engine=transformer_engine),
    )
    if getattr(bridge.hf_config, "tie_word_embeddings", False) and layout.pp_size > 1:
        raise ConfigError(
            f"{model_path} ties its output to its embedding; mbridge cannot load it with "
            f"pipeline_model_parallel_size {layout.pp_size}: set it to 1"
        )
    if settings.moe_router_bias_update_rate and not bridge.config.moe_router_enable_expert_bias:
        raise ConfigError(
            f"moe_router_bias_update_rate is {settings.moe_router_bias_update_rate}, but {model_path} has no expert "
            "bias: leave it out"
        )
    chunks = bridge.get_model(bf16=model_args.dtype == "bf16")
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            # TransformerEngine marks these as split, but every tensor-parallel rank holds them whole
            if name.endswith(("linear_q_down_proj.weight", "linear_kv_down_proj.weight")):
                parameter.tensor_model_parallel = False
    weights.load_weights(bridge, chunks, model_path)
    if fp32_lm_head:
        for chunk in chunks:
            _compute_logits_in_fp32(weights.unwrap(chunk))
    routers = [adopt_routers(weights.unwrap(chunk)) for chunk in chunks]
    if trains:
        chunks = wrap_for_training(chunks, bridge.config, settings)
    return MegatronModel(
        chunks=chunks,
        config=bridge.config,
        routers=routers,
        vocab_size=bridge.vocab_size,
        device=device,
        export=WeightExport(bridge, chunks),
    )


def _check_recompute(settings: MegatronConfig, *, grouped: bool, transformer_engine: bool) -> None:
    """Raise ConfigError for modules recomputed only by layers of TransformerEngine."""
    if "layernorm" in settings.recompute_modules and not transformer_engine:
        raise ConfigError("recompute_modules has layernorm, which needs TransformerEngine on a GPU: take it out")
    if "moe_act" in settings.recompute_modules and not grouped:
        raise ConfigError("recompute_modules has moe_act, which needs moe_grouped_gemm: take it out")


def _compute_logits_in_fp32(model: Any) -> None:
    """Make the output layer, if in this chunk, convert its input and weight to fp32 before the product.

    The weight itself (possibly the embedding's) is unchanged. The product uses a copy, so the matrix product cannot add
    its gradient to the fp32 sum: the gradient arrives in the weight's dtype first.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    layer.gradient_accumulation_fusion = False
    native = layer.forward

    def forward(input_: torch.Tensor, weight: torch.Tensor | None = None, **options: Any) -> Any:
        weight = layer.weight if weight is None else weight
        return native(input_.float(), weight=weight.float(), **options)

    layer.forward = forward


def _overrides(
    settings: MegatronConfig, layout: RankLayout, *, grouped: bool, replays: bool, transformer_engine: bool
) -> dict[str, Any]:
    """TransformerConfig fields independent of the checkpoint."""
    recompute = settings.recompute_granularity
    fields: dict[str, Any] = {
        "sequence_parallel": layout.sequence_parallel,
        "num_layers_in_first_pipeline_stage": settings.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": settings.num_layers_in_last_pipeline_stage,
        "account_for_embedding_in_pipeline_split": settings.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": settings.account_for_loss_in_pipeline_split,
        "pipeline_model_parallel_layout": settings.pipeline_model_parallel_layout,
        "recompute_granularity": recompute,
        "recompute_method": settings.recompute_method if recompute == "full" else None,
        "recompute_num_layers": settings.recompute_num_layers if recompute == "full" else None,
        "recompute_modules": list(settings.recompute_modules) if recompute == "selective" else None,
        "moe_token_dispatcher_type": settings.moe_token_dispatcher_type,
        "moe_grouped_gemm": grouped,
        "moe_router_dtype": settings.moe_router_dtype,
        "moe_router_fusion": settings.moe_router_fusion,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": settings.moe_router_bias_update_rate,
        "moe_enable_routing_replay": replays,
        # gradients are summed, not averaged, over micro-batches and ranks: the loss is divided before
        "calculate_per_token_loss": True,
        # megatron refuses it with the allgather dispatcher; micro-batches are padded to one width for it instead
        "variable_seq_lengths": settings.moe_token_dispatcher_type != "allgather",
        "deallocate_pipeline_outputs": layout.pp_size > 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    # megatron's own fused kernels need a GPU
    fusions = ("persist_layer_norm", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
    return fields | dict.fromkeys(fusions, transformer_engine)


def wrap_for_training(
    chunks: list[torch.nn.Module], config: TransformerConfig, settings: MegatronConfig
) -> list[torch.nn.Module]:
    """Wrap chunks for data parallelism, without megatron's own division of gradients."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
    )
    wrapped: list[torch.nn.Module] = [
        # chunks after the first overlap with compute anyway, so they need no buckets
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if settings.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **groups: Any) -> None:
        # num_tokens would divide by the tokens of the step; the loss is already divided by its own denominator
        finalize_model_grads(model, None, **groups)

    config.finalize_model_grads_func = finalize
    return wrapped
