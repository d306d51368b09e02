"""Typed `strategy_config` blocks, one per strategy name of `roll_r3.strategies.registry`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.pipeline_layout import PipelineLayout, parse_pipeline_layout


class ServerConfig(Config):
    """Settings of every rollout engine with a server of its own."""

    host: str = "127.0.0.1"
    """Address of the server. Loopback serves a trainer on the same node only; several nodes need `0.0.0.0`, every
    address of the engine's node (the server always asks for a key)."""
    tp_size: PositiveInt = 1
    """Tensor-parallel size of one engine, in devices. The number of engines is the devices of `actor_infer` /
    tp_size."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the engine's weights and computation."""
    startup_timeout: Seconds = 600.0
    """Seconds allowed for the start of a server."""
    request_timeout: Seconds = 1800.0
    """Seconds allowed for a generation request, with its wait in the engine's queue."""
    hang_timeout: Seconds = 300.0
    """Seconds without a sign of life from an engine with requests, before its restart. It gives one between batches of
    tokens, so this must exceed the longest batch, not the longest request."""
    max_restarts: NonNegativeInt = 3
    """Number of restarts of an engine that died, hung or returned nothing usable, per engine and step. One more ends
    the run."""
    max_concurrent_requests: PositiveInt = 512
    """Requests in flight per engine; further ones wait in the client."""
    max_retries: NonNegativeInt = 3
    """Number of retries of a sample after a failed request or an invalid payload; then the sample is dropped and
    counted."""
    weight_bucket_mb: PositiveFloat = 512.0
    """Size in MiB of the groups in which weights are broadcast to the engine."""
    max_running_requests: PositiveInt | None = None
    """Requests decoded at once; default: the engine's choice, 64 for vLLM on a CPU."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens; default: by device memory; on a CPU, for the longest samples decoded at once."""
    context_length: PositiveInt | None = None
    """Context of the engine in tokens; default: prompt_length + response_length + the few tokens reserved by the
    engine."""
    server_args: dict[str, str | int | float | bool] = {}
    """Further arguments of the engine's server, named as on its command line with underscores. Those set by the
    strategy (model, address, key, routed experts, ...) or losing routes are rejected."""


class SglangConfig(ServerConfig):
    """The SGLang server of one rollout engine."""

    python: str | None = None
    """Python interpreter with SGLang; default: the one of this run. SGLang's pinned versions often conflict with
    others."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of device memory for weights and KV cache; default: SGLang's choice. No effect on a CPU."""
    chunked_prefill_size: int | None = None
    """Tokens of a prefill chunk; default: SGLang's choice."""
    attention_backend: str | None = None
    """SGLang's `--attention-backend`; default: SGLang's choice on a GPU, `torch_native` on a CPU."""


class VllmConfig(ServerConfig):
    """The vLLM server of one rollout engine."""

    python: str = ".venv-vllm/bin/python"
    """Python interpreter with vLLM, in an environment of its own (its pins conflict with SGLang's): `make vllm-env`, on
    GPUs `make vllm-env VLLM_KIND=gpu`. Relative to the working directory; the same path on all nodes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of device memory for weights, activations and KV cache; default: vLLM's choice. No effect on a CPU."""


class HfInferConfig(Config):
    """A transformers model as rollout engine, on one device in the actor's process."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the engine's weights and computation."""
    max_running_requests: PositiveInt = 64
    """Samples decoded at once, each with a KV cache for its prompt and response."""
    weight_bucket_mb: PositiveFloat = 512.0
    """Size in MiB of the groups in which weights are broadcast to the engine."""


class Fsdp2Config(Config):
    """A transformers model under PyTorch's FSDP2. Every device is a data-parallel rank with its part of each weight.
    Samples are not split over devices: there is no sequence, context, tensor or expert parallelism."""

    recompute: bool = False
    """Recompute each decoder layer's activations in backward instead of storing them."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for its backward."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention of transformers: PyTorch's fused function, or plain matrix products."""


class MegatronConfig(Config):
    """Layout and execution by megatron-core. Names and meanings are megatron-core's unless stated otherwise."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that split every weight matrix (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline stage (VPP); needs PP of 2 or more. Default: as in `pipeline_model_parallel_layout`,
    else one chunk, the plain 1F1B schedule."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share a layer's experts (EP)."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that split one expert's matrices (ETP); default: 1 with expert parallelism, else TP."""
    context_parallel_size: PositiveInt = 1
    """Ranks that split each sequence in attention (CP)."""
    sequence_parallel: bool | None = None
    """Split the sequence between transformer blocks over TP (SP); default: if TP is above 1, as MoE needs."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Decoder layers of the first stage, if stages are uneven."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Decoder layers of the last stage, if stages are uneven."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer in an even split: the first chunk has one decoder layer less."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as a layer in an even split: the last chunk has one decoder layer less."""
    pipeline_model_parallel_layout: PipelineLayout | None = None
    """Layers of every stage, as in `Et*3|t*2|t*2L`: E embedding, t decoder layer, L loss, `|` between stages, `t*3` or
    `(tt|)*3` to repeat. Stage i is chunk i // PP of pipeline rank i % PP; VPP is the number of stages / PP."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and master weights over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during backward."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward instead of storing them: of whole layers (full), or of `recompute_modules`
    (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute. uniform: every group of `recompute_num_layers` layers. block: the first
    `recompute_num_layers` layers of each chunk."""
    recompute_num_layers: PositiveInt | None = None
    """Number of layers, see `recompute_method`."""
    recompute_modules: tuple[
        Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"], ...
    ] = ()
    """Modules to recompute, with selective recompute."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """Collective that sends tokens to the ranks of their experts."""
    moe_grouped_gemm: bool | None = None
    """Compute a rank's experts in one grouped matrix product; default: if TransformerEngine is installed."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Precision of router logits and gates; null: the model's own."""
    moe_router_fusion: bool = False
    """Megatron's fused top-k kernel. Rejected under replay: it never reads the recorded routes."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss; must be 0, since this loss takes its own top-k and would balance unused
    experts."""
    moe_router_bias_update_rate: NonNegativeFloat = 0.0
    """Step of the DeepSeek-style expert bias towards balance, per optimizer step; 0: the bias stays as in the
    checkpoint."""

    @property
    def chunks_per_stage(self) -> int | None:
        """Model chunks per pipeline stage, from VPP or the layout; None: the plain schedule with one chunk."""
        chunks = self.virtual_pipeline_model_parallel_size or 1
        if self.virtual_pipeline_model_parallel_size is None and self.pipeline_model_parallel_layout is not None:
            chunks = (
                len(parse_pipeline_layout(self.pipeline_model_parallel_layout)) // self.pipeline_model_parallel_size
            )
        return chunks if chunks > 1 else None
