"""Typed `strategy_config` blocks, one per strategy name; `roll_r3.strategies.registry` uses the same names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.pipeline_layout import PipelineLayout, parse_pipeline_layout


class ServerConfig(Config):
    """What a rollout engine that is a server of its own is told, whichever it is."""

    host: str = "127.0.0.1"
    """Address the server binds to. Loopback serves a trainer on the same node only; `0.0.0.0` is every address of the
    engine's node, which a cluster of several nodes needs (the server always demands a key)."""
    tp_size: PositiveInt = 1
    """Tensor-parallel size of one engine, in devices. The engines of `actor_infer` are its devices divided by this."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute and weight precision of the engine."""
    startup_timeout: Seconds = 600.0
    """Seconds a server may take until it answers."""
    request_timeout: Seconds = 1800.0
    """Seconds a generation request may take, queueing in the engine included."""
    hang_timeout: Seconds = 300.0
    """Seconds that an engine with requests may give no sign of life until it is killed and started again. It gives one
    between any two batches of tokens, so this must be longer than the longest batch, not than a request."""
    max_restarts: NonNegativeInt = 3
    """How often an engine that died, hung or gave nothing usable is started again before a step of the run is done;
    once more ends the run. The count of every engine begins anew with every step. 0: the first time ends the run."""
    max_concurrent_requests: PositiveInt = 512
    """Requests in flight per engine; more wait in the client."""
    max_retries: NonNegativeInt = 3
    """How often a sample is asked for again when its request failed or its payload broke the contract; then it is
    dropped and counted."""
    weight_bucket_mb: PositiveFloat = 512.0
    """Weights are broadcast to the engine in groups of about this many MiB."""
    max_running_requests: PositiveInt | None = None
    """Requests the engine decodes at once; default: the engine's choice, 64 of vLLM on a CPU."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens; default: what the device's memory allows, on a CPU room for as many of the
    longest samples as the engine decodes at once."""
    context_length: PositiveInt | None = None
    """Context of the engine in tokens; default: prompt_length + response_length and the few that engines keep."""
    server_args: dict[str, str | int | float | bool] = {}
    """Further arguments of the engine's server, by the names of its command line with underscores. Those that the
    strategy owns (model, address, key, routed experts, ...) and those that lose routes are refused."""


class SglangConfig(ServerConfig):
    """The SGLang server that one rollout engine runs."""

    python: str | None = None
    """Interpreter that has SGLang installed; default: the one that runs roll_r3. SGLang's pins often clash with
    others'."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of device memory for weights and KV cache; default: SGLang's choice. Without meaning on a CPU."""
    chunked_prefill_size: int | None = None
    """Prefill is cut into chunks of this many tokens; default: SGLang's choice."""
    attention_backend: str | None = None
    """SGLang's `--attention-backend`; default: SGLang's choice on a GPU, `torch_native` on a CPU."""


class VllmConfig(ServerConfig):
    """The vLLM server that one rollout engine runs."""

    python: str = ".venv-vllm/bin/python"
    """Interpreter that has vLLM installed: `make vllm-env` makes this one, for GPUs `make vllm-env VLLM_KIND=gpu`.
    vLLM's pins clash with SGLang's, so it has an environment of its own. Relative to where the run starts; on several
    nodes, a path that all of them have."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of device memory for weights, activations and KV cache; default: vLLM's choice. Without meaning on a
    CPU."""


class HfInferConfig(Config):
    """A rollout engine that is a transformers model on one device, in the actor's own process."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute and weight precision of the engine."""
    max_running_requests: PositiveInt = 64
    """Samples the engine decodes at once, each with a KV cache for its prompt and response."""
    weight_bucket_mb: PositiveFloat = 512.0
    """Weights are broadcast to the engine in groups of about this many MiB."""


class Fsdp2Config(Config):
    """How PyTorch's FSDP2 runs a transformers model: every device is a data-parallel rank that holds its part of each
    weight. Samples are not split over devices: there is no sequence, context, tensor or expert parallelism."""

    recompute: bool = False
    """Recompute each decoder layer's activations in backward instead of storing them."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for its backward."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Which of transformers' attention functions: PyTorch's fused one, or plain matrix products."""


class MegatronConfig(Config):
    """How megatron-core lays out and runs the model. Names and meanings are megatron-core's unless said otherwise."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that split every weight matrix (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline stage (VPP); needs PP of 2 or more. None: as many as `pipeline_model_parallel_layout`
    says, else one chunk, the plain 1F1B schedule."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share out the experts of a layer (EP)."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that split one expert's matrices (ETP); default: 1 with expert parallelism, else TP."""
    context_parallel_size: PositiveInt = 1
    """Ranks that split each sequence in attention (CP)."""
    sequence_parallel: bool | None = None
    """Split the sequence between transformer blocks over TP (SP); default: whenever TP is above 1, which MoE needs."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Decoder layers of the first stage, when stages are uneven."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Decoder layers of the last stage, when stages are uneven."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are shared out evenly: the first chunk gets one decoder layer less."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as a layer: the last chunk gets one decoder layer less."""
    pipeline_model_parallel_layout: PipelineLayout | None = None
    """Every stage's layers, as in `Et*3|t*2|t*2L`: E embedding, t a decoder layer, L the loss, `|` between stages,
    `t*3` or `(tt|)*3` to repeat. With more stages than PP, stage i is chunk i // PP of pipeline rank i % PP, and VPP is
    the number of stages / PP."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and master weights over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward instead of storing them: whole layers, or the modules in
    `recompute_modules`."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: every group of `recompute_num_layers` layers, or the first so many of each chunk."""
    recompute_num_layers: PositiveInt | None = None
    """Layers, see `recompute_method`."""
    recompute_modules: tuple[
        Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"], ...
    ] = ()
    """With selective recompute: which modules."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts' ranks."""
    moe_grouped_gemm: bool | None = None
    """Compute a rank's experts in one grouped matrix product; default: where TransformerEngine is installed."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Precision of router logits and gates; None: the model's own."""
    moe_router_fusion: bool = False
    """Megatron's fused top-k kernel. Refused under replay: it never consults the recorded routes."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss. Only 0 is accepted: it takes a top-k of its own, and so balances experts
    that no token used."""
    moe_router_bias_update_rate: NonNegativeFloat = 0.0
    """DeepSeek-style expert bias: how far an optimizer step moves it towards balance; 0: it stays as in the
    checkpoint."""

    @property
    def chunks_per_stage(self) -> int | None:
        """Model chunks per pipeline stage, the layout's count filled in; None: the plain schedule with one chunk."""
        chunks = self.virtual_pipeline_model_parallel_size or 1
        if self.virtual_pipeline_model_parallel_size is None and self.pipeline_model_parallel_layout is not None:
            chunks = (
                len(parse_pipeline_layout(self.pipeline_model_parallel_layout)) // self.pipeline_model_parallel_size
            )
        return chunks if chunks > 1 else None
