"""Bytes kept by a decoder layer for its backward, with and without recomputation.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4), term by term, for the layers built here: RMSNorm, gated networks,
grouped-query or latent attention, experts. Attention keeps one sum per row instead of the scores, like fused kernels
(Dao et al. 2022, arXiv 2205.14135). Between the blocks a sequence is split over tensor-parallel ranks (sequence
parallelism).

Not counted: dropout (there is none), rotary tables, index tensors of the dispatcher, temporaries inside a kernel, and
uneven routing. Every expert is assumed to get an equal number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from roll_r3.config.strategies import MegatronConfig
from roll_r3.models.size import Shape
from roll_r3.preflight.plan.ranks import Grid

ROUTER_BYTES = {"fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Kept:
    """Bytes kept by one rank for one micro-batch in one layer."""

    name: str
    size: int
    recomputed_with: frozenset[str] = frozenset()
    """Entries of `recompute_modules`; any one of them avoids these bytes."""


@dataclass(frozen=True)
class ChunkActivations:
    """Bytes of one rank in one model chunk."""

    stored: int
    """Bytes for every micro-batch in flight."""
    recomputed: int
    """Maximum bytes during recomputation in backward, for one micro-batch at a time."""


@dataclass(frozen=True)
class LayerCost:
    """Inputs to the activation size of a layer."""

    shape: Shape
    grid: Grid
    settings: MegatronConfig
    tokens: int
    """Tokens of a micro-batch on one context-parallel rank, padding included."""
    element: int
    """Bytes per number."""

    @property
    def _split_tokens(self) -> int:
        """Number of tokens on a rank between the blocks."""
        return self.tokens if self.settings.sequence_parallel is False else self.tokens // self.grid.tp

    @property
    def layer_input(self) -> int:
        """Bytes of the hidden states between two layers."""
        return self._split_tokens * self.shape.hidden * self.element

    def kept(self, layer: int) -> tuple[Kept, ...]:
        """Return the bytes kept by a layer without recomputation."""
        mlp = self._moe() if layer in self.shape.moe_layers else self._dense()
        return (*self._attention(), *mlp)

    def chunk(self, layers: Sequence[int]) -> ChunkActivations:
        """Return the bytes of a chunk's layers under the recompute settings."""
        granularity = self.settings.recompute_granularity
        whole = [sum(kept.size for kept in self.kept(layer)) for layer in layers]
        if not layers or granularity is None:
            return ChunkActivations(sum(whole), 0)
        if granularity == "selective":
            modules = set(self.settings.recompute_modules)
            spared = [sum(k.size for k in self.kept(layer) if k.recomputed_with & modules) for layer in layers]
            return ChunkActivations(sum(whole) - sum(spared), max(spared))
        size = self.settings.recompute_num_layers or 1
        if self.settings.recompute_method == "block":
            again = whole[:size]
            return ChunkActivations(len(again) * self.layer_input + sum(whole[size:]), max(again))
        groups = [sum(whole[start : start + size]) for start in range(0, len(whole), size)]
        return ChunkActivations(len(groups) * self.layer_input, max(groups))

    def _attention(self) -> Iterator[Kept]:
        shape, tp, element = self.shape, self.grid.tp, self.element
        heads = shape.heads // tp
        yield Kept("input of the layer", self.layer_input)
        yield Kept("input of the projections", self.layer_input, frozenset({"layernorm"}))
        if shape.latent:
            compressed = 2 * (shape.latent.query_rank or 0) + 2 * shape.latent.key_value_rank + shape.latent.rotary_dim
            yield Kept("compressed queries, keys and values", self._split_tokens * compressed * element)
            width = heads * (2 * shape.key_dim + shape.value_dim)
            yield Kept("queries, keys and values", self.tokens * width * element, frozenset({"mla_up_proj"}))
        else:
            kv_heads = max(1, shape.kv_heads // tp)
            width = heads * shape.key_dim + kv_heads * (shape.key_dim + shape.value_dim)
            yield Kept("queries, keys and values", self.tokens * width * element)
            if shape.qk_norm:
                width = (heads + kv_heads) * shape.key_dim
                yield Kept("queries and keys before their norms", self.tokens * width * element)
        yield Kept("output of attention", self.tokens * heads * shape.value_dim * element)
        yield Kept("row sums of attention", self.tokens * heads * 4, frozenset({"core_attn"}))

    def _dense(self) -> Iterator[Kept]:
        yield from self._norm()
        modules = frozenset({"mlp"})
        width = self.shape.ffn // self.grid.tp
        yield Kept("gate and up", self.tokens * 2 * width * self.element, modules)
        yield Kept("input of the down projection", self.tokens * width * self.element, modules)

    def _moe(self) -> Iterator[Kept]:
        shape, element = self.shape, self.element
        whole = frozenset({"moe"})
        yield from self._norm()
        router = ROUTER_BYTES.get(self.settings.moe_router_dtype or "", element)
        # scores, gates and a mask of all experts
        yield Kept("router", self._split_tokens * shape.num_experts * (2 * router + 1), whole)
        copies = self._split_tokens * shape.top_k * self.grid.etp
        width = shape.expert_ffn // self.grid.etp
        yield Kept("tokens at their experts", copies * shape.hidden * element, whole)
        yield Kept("gate and up of the experts", copies * 2 * width * element, whole)
        yield Kept("input of the experts' down projection", copies * width * element, whole | {"moe_act"})
        if shape.shared_ffn:
            width = shape.shared_ffn // self.grid.tp
            yield Kept("shared expert", self.tokens * 3 * width * element, whole | {"shared_experts"})

    def _norm(self) -> Iterator[Kept]:
        yield Kept("input of the second norm", self.layer_input)
        yield Kept("input of the network", self.layer_input, frozenset({"layernorm"}))
