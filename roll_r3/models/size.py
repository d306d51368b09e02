"""Number of parameters of a model, and of each rank of a layout, computed from a config.json.

Parameters have megatron's names, as in `Architecture.layer_names`. Buffers such as an expert bias are not counted, nor
are multi-token-prediction layers: they are not built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from roll_r3.config.derived import MegatronWorker, expert_layout, layout
from roll_r3.errors import ConfigError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.architectures.base import DENSE_MLP, RawConfig, read_integer
from roll_r3.models.facts import ModelFacts, facts_of
from roll_r3.models.layer_map import chunk_layers


class Split(Enum):
    """Ranks that share a parameter."""

    WHOLE = "every rank holds it whole"
    TENSOR = "tensor-parallel ranks"
    EXPERTS = "expert-parallel and expert-tensor-parallel ranks"


@dataclass(frozen=True)
class Weight:
    """Parameter of a layer, or the same parameter of all its experts."""

    name: str
    size: int
    """Number of elements over all ranks and all experts."""
    split: Split


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention."""

    query_rank: int | None
    """None: queries are projected in one step."""
    key_value_rank: int
    rotary_dim: int
    """Size of the rotary part of a key, shared by all heads."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. They determine its parameters and activations."""

    num_layers: int
    moe_layers: frozenset[int]
    hidden: int
    vocab: int
    tied: bool
    """True if the output layer is the embedding."""
    heads: int
    kv_heads: int
    key_dim: int
    """Size of a query and of a key in one head."""
    value_dim: int
    latent: Latent | None
    qk_norm: bool
    whole_qk_norm: bool
    """See `Architecture.whole_qk_norm`."""
    ffn: int
    """Width of a dense layer's feed-forward network."""
    num_experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    """Width of the shared expert; 0 without one."""


def shape_of(config: RawConfig) -> Shape:
    """Read the sizes of a model from its config.json.

    Raises:
        ConfigError: unknown architecture, or a size is missing or invalid.
    """
    facts = facts_of(config)
    try:
        return _shape(config, facts)
    except KeyError as error:
        raise ConfigError(f"this config.json of a {facts.model_type} has no {error.args[0]}") from error
    except ValueError as error:
        raise ConfigError(f"this config.json of a {facts.model_type} cannot be read: {error}") from error


def shape_problem(config: RawConfig) -> str:
    """Return why the sizes of a config.json cannot be read; empty if they can."""
    try:
        shape_of(config)
    except ConfigError as error:
        return str(error)
    return ""


def _shape(config: RawConfig, facts: ModelFacts) -> Shape:
    """Raise KeyError for a missing field, ValueError for an invalid size."""
    architecture = ARCHITECTURES[facts.model_type]
    hidden, ffn = read_integer(config, "hidden_size"), read_integer(config, "intermediate_size")
    latent = None
    if architecture.latent_attention:
        rotary = read_integer(config, "qk_rope_head_dim")
        query_rank = None if config["q_lora_rank"] is None else read_integer(config, "q_lora_rank")
        latent = Latent(query_rank, read_integer(config, "kv_lora_rank"), rotary)
        key_dim, value_dim = read_integer(config, "qk_nope_head_dim") + rotary, read_integer(config, "v_head_dim")
    else:
        key_dim = value_dim = _size_or(config, "head_dim", hidden // facts.num_attention_heads)
    expert_ffn = _size_or(config, "moe_intermediate_size", ffn)
    shared_ffn = _size_or(
        config, "shared_expert_intermediate_size", _size_or(config, "n_shared_experts", 0) * expert_ffn
    )
    return Shape(
        num_layers=facts.num_layers,
        moe_layers=frozenset(facts.moe_layers),
        hidden=hidden,
        vocab=facts.vocab_size,
        tied=bool(config.get("tie_word_embeddings", False)),
        heads=facts.num_attention_heads,
        kv_heads=facts.num_key_value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        latent=latent,
        qk_norm=architecture.has("self_attention.k_layernorm.weight", config),
        whole_qk_norm=architecture.whole_qk_norm,
        ffn=ffn,
        num_experts=facts.num_experts,
        top_k=facts.top_k,
        expert_ffn=expert_ffn,
        shared_ffn=shared_ffn if architecture.has("mlp.shared_experts.linear_fc1.weight", config) else 0,
    )


def _size_or(config: RawConfig, name: str, default: int) -> int:
    """Return a size, or the default if the field is missing, null or 0."""
    return default if config.get(name) in (None, 0) else read_integer(config, name)


def _queries(shape: Shape) -> int:
    return shape.heads * shape.key_dim


def _qkv(shape: Shape) -> int:
    return _queries(shape) + shape.kv_heads * (shape.key_dim + shape.value_dim)


def _query_norm(shape: Shape) -> tuple[int, Split]:
    if shape.latent:
        return shape.latent.query_rank or 0, Split.WHOLE
    return (_queries(shape), Split.TENSOR) if shape.whole_qk_norm else (shape.key_dim, Split.WHOLE)


def _key_norm(shape: Shape) -> tuple[int, Split]:
    return (shape.kv_heads * shape.key_dim, Split.TENSOR) if shape.whole_qk_norm else (shape.key_dim, Split.WHOLE)


def _latent(size: Callable[[Shape, Latent], int], split: Split) -> Callable[[Shape], tuple[int, Split]]:
    return lambda shape: (size(shape, shape.latent) if shape.latent else 0, split)


_SIZES: dict[str, Callable[[Shape], tuple[int, Split]]] = {
    "input_layernorm.weight": lambda s: (s.hidden, Split.WHOLE),
    "pre_mlp_layernorm.weight": lambda s: (s.hidden, Split.WHOLE),
    "self_attention.linear_qkv.weight": lambda s: (_qkv(s) * s.hidden, Split.TENSOR),
    "self_attention.linear_qkv.bias": lambda s: (_qkv(s), Split.TENSOR),
    "self_attention.linear_proj.weight": lambda s: (s.heads * s.value_dim * s.hidden, Split.TENSOR),
    "self_attention.q_layernorm.weight": _query_norm,
    "self_attention.k_layernorm.weight": _key_norm,
    "self_attention.linear_q_proj.weight": _latent(
        lambda s, latent: 0 if latent.query_rank else s.hidden * _queries(s), Split.TENSOR
    ),
    "self_attention.linear_q_down_proj.weight": _latent(
        lambda s, latent: s.hidden * (latent.query_rank or 0), Split.WHOLE
    ),
    "self_attention.linear_q_up_proj.weight": _latent(
        lambda s, latent: (latent.query_rank or 0) * _queries(s), Split.TENSOR
    ),
    "self_attention.linear_kv_down_proj.weight": _latent(
        lambda s, latent: s.hidden * (latent.key_value_rank + latent.rotary_dim), Split.WHOLE
    ),
    "self_attention.kv_layernorm.weight": _latent(lambda s, latent: latent.key_value_rank, Split.WHOLE),
    "self_attention.linear_kv_up_proj.weight": _latent(
        lambda s, latent: latent.key_value_rank * s.heads * (s.key_dim - latent.rotary_dim + s.value_dim), Split.TENSOR
    ),
    "mlp.linear_fc1.weight": lambda s: (2 * s.ffn * s.hidden, Split.TENSOR),
    "mlp.linear_fc2.weight": lambda s: (s.ffn * s.hidden, Split.TENSOR),
    "mlp.router.weight": lambda s: (s.num_experts * s.hidden, Split.WHOLE),
    "mlp.router.expert_bias": lambda s: (0, Split.WHOLE),  # a buffer
    "mlp.experts.linear_fc1.weight": lambda s: (s.num_experts * 2 * s.expert_ffn * s.hidden, Split.EXPERTS),
    "mlp.experts.linear_fc2.weight": lambda s: (s.num_experts * s.expert_ffn * s.hidden, Split.EXPERTS),
    "mlp.shared_experts.linear_fc1.weight": lambda s: (2 * s.shared_ffn * s.hidden, Split.TENSOR),
    "mlp.shared_experts.linear_fc2.weight": lambda s: (s.shared_ffn * s.hidden, Split.TENSOR),
    "mlp.shared_experts.gate_weight": lambda s: (s.hidden, Split.WHOLE),
}
"""Elements of each parameter of a layer; 0 if the model lacks it."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model."""

    shape: Shape
    layers: tuple[tuple[Weight, ...], ...]
    """Parameters of each decoder layer."""

    @property
    def total(self) -> int:
        return self._counted(lambda weight: weight.size)

    @property
    def active(self) -> int:
        """Number of parameters used for one token, embedding and output layer included."""
        experts, top_k = self.shape.num_experts, self.shape.top_k
        return self._counted(lambda w: w.size // experts * top_k if w.split is Split.EXPERTS else w.size)

    def _counted(self, size: Callable[[Weight], int]) -> int:
        shape = self.shape
        outside = shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.hidden
        return outside + sum(size(weight) for weights in self.layers for weight in weights)


def model_size(config: RawConfig) -> ModelSize:
    """Return the parameters of a model.

    Args:
        config: its config.json.

    Raises:
        ConfigError: unknown architecture, or a size is missing or invalid.
    """
    shape = shape_of(config)
    architecture = ARCHITECTURES[str(config["model_type"])]
    weights = [Weight(n, *_SIZES[n](shape)) for n in architecture.layer_names if architecture.has(n, config)]
    held = [weight for weight in weights if weight.size]
    dense = tuple(w for w in held if not w.name.startswith("mlp.") or w.name in DENSE_MLP)
    routed = tuple(w for w in held if w.name not in DENSE_MLP)
    layers = (routed if layer in shape.moe_layers else dense for layer in range(shape.num_layers))
    return ModelSize(shape, tuple(layers))


@dataclass(frozen=True)
class Held:
    """Parameters of a model chunk on one rank; equal on all ranks of a pipeline stage."""

    layers: tuple[int, ...]
    """Global decoder layers, ascending."""
    dense: int
    """Parameters outside experts."""
    tensor: int
    """Number of `dense` parameters split over tensor-parallel ranks: this rank's part."""
    experts: int
    """Parameters of experts."""


def held_parameters(model: ModelSize, worker: MegatronWorker) -> tuple[tuple[Held, ...], ...]:
    """Return the parameters on a rank of each stage, [stage][chunk].

    Raises:
        ValueError: the layers, a width or the experts do not divide over the layout.
    """
    settings, shape = layout(worker), model.shape
    tp = settings.tensor_model_parallel_size
    etp, ep, _ = expert_layout(worker)
    stages = chunk_layers(shape.num_layers, settings)
    problems = _uneven_widths(shape, worker)
    if shape.moe_layers and shape.num_experts % ep:
        problems.append(f"{shape.num_experts} experts do not divide over EP {ep}")
    if problems:
        raise ValueError("; ".join(problems))
    vocab = vocab_columns(shape, tp) * shape.hidden
    found = []
    for stage, chunks in enumerate(stages):
        of_stage = []
        for number, layers in enumerate(chunks):
            weights = [weight for layer in layers for weight in model.layers[layer]]
            first = stage == 0 and number == 0
            last = stage == len(stages) - 1 and number == len(chunks) - 1
            tensor = _elements(weights, Split.TENSOR) // tp + vocab * (first + (last and not (first and shape.tied)))
            whole = _elements(weights, Split.WHOLE) + shape.hidden * last
            experts = _elements(weights, Split.EXPERTS) // (ep * etp)
            of_stage.append(Held(layers, whole + tensor, tensor, experts))
        found.append(tuple(of_stage))
    return tuple(found)


def vocab_columns(shape: Shape, tp: int) -> int:
    """Return the rows of the embedding on a tensor-parallel rank. The vocabulary is padded until it divides."""
    return -(-shape.vocab // tp)


def width_problems(config: RawConfig, worker: MegatronWorker) -> list[str]:
    """Return widths of a model that megatron-core cannot divide over the tensor-parallel ranks of a role.

    The vocabulary is not checked: it is padded.

    Args:
        config: its config.json.

    Raises:
        ConfigError: unknown architecture, or a size is missing or invalid.
    """
    return _uneven_widths(shape_of(config), worker)


def _uneven_widths(shape: Shape, worker: MegatronWorker) -> list[str]:
    tp, (etp, _, _) = layout(worker).tensor_model_parallel_size, expert_layout(worker)
    widths = [("the number of attention heads", shape.heads, "TP", tp)]
    if shape.latent is None:
        if tp % shape.kv_heads:  # else each head is shared by an equal number of ranks
            widths.append(("the number of key and value heads", shape.kv_heads, "TP", tp))
        widths.append(("the width of queries, keys and values together", _qkv(shape), "TP", tp))
        if shape.whole_qk_norm:
            widths.append(("the width of keys", shape.kv_heads * shape.key_dim, "TP", tp))
    if len(shape.moe_layers) < shape.num_layers:
        widths.append(("the width of a dense layer", shape.ffn, "TP", tp))
    if shape.moe_layers:
        widths.append(("the width of an expert", shape.expert_ffn, "ETP", etp))
        widths.append(("the width of the shared expert", shape.shared_ffn, "TP", tp))
    return [
        f"{what}, {size:,}, does not divide over {axis} {ranks}" for what, size, axis, ranks in widths if size % ranks
    ]


def _elements(weights: Iterable[Weight], split: Split) -> int:
    """Return the number of elements of all parameters with this split."""
    return sum(weight.size for weight in weights if weight.split is split)
