"""Batches, settings and the slow reference for the tests of all trainers.

The reference is transformers' model, one sample at a time, without padding, with its routers forced to the given
rows; its loss and its optimizer are written out here in plain PyTorch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from epsilon import with_one_epsilon

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.config.model_role import ModelRole, Role, model_role
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.models.facts import read_facts
from roll_r3.platform import megatron_cpu
from roll_r3.replay.counts import ReplayCounts
from roll_r3.replay.expert_load import ExpertLoad
from roll_r3.strategies.base import ProcessInfo

LAYERS, EXPERTS, TOP_K, VOCAB = 4, 16, 2, 260
SAMPLES = 8
LONGEST = 20
"""Tokens of the longest sample of `make_batch`."""

Weights = dict[str, npt.NDArray[np.float32]]

STEEP = 1e4
GRADIENT = {
    "learning_rate": STEEP,
    "adam_epsilon": STEEP,
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "max_grad_norm": 0.0,
}
"""Training arguments under which one Adam step moves every weight by -g / (1 + |g| / STEEP). The exported weights then
show the gradients, for every optimizer, sharding and layout."""

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """One run of a training rank."""

    checkpoint: str
    layout: dict[str, Any] = field(default_factory=dict)
    mode: str = "R3"
    packed: bool = False
    dtype: str = "fp32"
    micro_batch_size: int = 2
    mini_batches: int = 1
    """Optimizer steps of the training step."""
    infer_batch_size: int | None = 3
    """Samples in a pass without gradients; None is the default, used where a token budget cuts these passes."""
    training: dict[str, Any] = field(default_factory=lambda: dict(GRADIENT))
    role: dict[str, Any] = field(default_factory=dict)
    """Further fields of `actor_train`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the root of the configuration."""
    log_probs_first: bool = False
    """Compute log-probabilities before the training step."""
    engine: str = "megatron"
    """"megatron", or "fsdp2" with its own settings in `layout`."""

    def config(self, dp_size: int = 1) -> RLVRConfig:
        """Return a complete, valid configuration; it has a reference only for a KL loss."""
        accumulation = SAMPLES // (self.micro_batch_size * dp_size * self.mini_batches)
        role = {
            "model_args": {"dtype": self.dtype},
            "device_mapping": list(range(dp_size * self.model_parallel_size)),
            "use_sequence_packing": self.packed,
            **({} if self.infer_batch_size is None else {"infer_batch_size": self.infer_batch_size}),
        }
        reference = {**role, "strategy_args": {"strategy_name": f"{self.engine}_infer", "strategy_config": self.layout}}
        return RLVRConfig(
            exp_name=self.engine,
            pretrain=self.checkpoint,
            max_steps=10,
            rollout_batch_size=SAMPLES // 2,
            num_return_sequences_in_group=2,
            prompt_length=LONGEST - LONGEST // 2,
            response_length=LONGEST // 2,
            actor_train={
                **role,
                "router_replay": {"mode": self.mode},
                "data_args": {"file_name": "bundled:addition_mod10"},
                "strategy_args": {"strategy_name": f"{self.engine}_train", "strategy_config": self.layout},
                "training_args": {
                    "per_device_train_batch_size": self.micro_batch_size,
                    "gradient_accumulation_steps": accumulation,
                    **self.training,
                },
                **self.role,
            },
            actor_infer={
                "generating_args": {"temperature": 0.7},
                "router_replay": {"mode": "R3" if self.mode == "R3" else "disable"},
            },
            reference=reference if self.options.get("use_kl_loss") else None,
            **self.options,
        )

    def view(self, dp_size: int = 1, name: Role = "actor_train") -> ModelRole:
        """View of the configuration for the ranks of one role."""
        return model_role(self.config(dp_size), name)

    @property
    def model_parallel_size(self) -> int:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return int(np.prod([self.layout.get(name, 1) for name in sizes]))


def make_model(path: Path, name: str, **overrides: Any) -> Path:
    """Make a tiny checkpoint with varied norms and biases, and with embeddings of unit size.

    At the initial size, the first norm would multiply the embeddings' gradients and their rounding by ten. For the
    padding token, with an embedding of zeros, it would be a thousand.
    """
    from safetensors.torch import load_file, save_file

    from roll_r3.models.tiny import make_tiny_checkpoint

    file = make_tiny_checkpoint(path, name, seed=1, **overrides) / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.ndim == 1 else tensor
        for name, tensor in load_file(file).items()
    }
    embedding = weights["model.embed_tokens.weight"]
    embedding[embedding.abs().sum(-1) == 0] = embedding[0].clone()
    weights["model.embed_tokens.weight"] = 10 * embedding
    save_file(weights, file, metadata={"format": "pt"})
    return path


def make_batch(
    seed: int = 0,
    *,
    unknown: float = 0.0,
    vocab: int = VOCAB,
    length: int | None = None,
    checkpoint: Path | None = None,
) -> Batch:
    """Ragged samples with random routes.

    Args:
        checkpoint: routes fit this one; None: the tiny Qwen3-MoE.
        unknown: share of rows marked as unknown to the engine.
        length: inputs of every sample; None: ragged.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LONGEST, SAMPLES) if length is None else np.full(SAMPLES, length)
    layers, experts, top_k = LAYERS, EXPERTS, TOP_K
    if checkpoint is not None:
        facts = read_facts(checkpoint)
        layers, experts, top_k = len(facts.moe_layers), facts.num_experts, facts.top_k
    total = int(lengths.sum())
    mask = rng.random(total) < 0.7
    routes = []
    for rows in lengths:
        ids = rng.random((layers, rows, experts)).argsort(-1)[..., :top_k].astype(np.uint8)
        known = None if not unknown else rng.random(rows) >= unknown
        routes.append(RoutedExperts(ids, known))
    log_probs = (-4 - rng.random(total)).astype(np.float32)
    return Batch(
        sample_ids=tuple(f"sample{i}" for i in range(SAMPLES)),
        lengths_n=lengths,
        input_ids_N=rng.integers(0, vocab, total),
        labels_N=rng.integers(0, vocab, total),
        loss_mask_N=mask,
        rollout_log_probs_N=np.where(mask, log_probs, 0).astype(np.float32),
        routes=tuple(routes),
        advantages_N=np.where(mask, rng.standard_normal(total), 0).astype(np.float32),
        old_log_probs_N=(log_probs + 0.05 * rng.standard_normal(total)).astype(np.float32),
        ref_log_probs_N=(log_probs + 0.1 * rng.standard_normal(total)).astype(np.float32),
        pg_weights_N=np.where(mask, rng.uniform(0, 2, total), 0).astype(np.float32),
    )


def shard(batch: Batch, rank: int, size: int) -> Batch:
    return batch.select(np.arange(batch.num_samples)[rank::size])


@dataclass
class Outcome:
    """Results of one rank of a case."""

    weights: Weights | None
    """Weights after the step; rank 0 only."""
    held: dict[tuple[Any, ...], str]
    """(place among model-parallel ranks, parameter) -> digest of this rank's copy."""
    metrics: dict[str, float]
    train_counts: ReplayCounts | None
    log_prob_counts: ReplayCounts | None = None
    load: ExpertLoad | None = None
    """Load found by the pass for log-probabilities."""
    log_probs: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None
    dp_rank: int = 0
    seconds_in_routes: float = 0.0
    at_rest: bool = True
    """True if no router holds anything after the step."""


def open_strategy(process: ProcessInfo, case: Case, role: Role = "actor_train") -> Any:
    """Return the strategy of a role, with its model built."""
    from roll_r3.strategies.registry import STRATEGIES

    kind = "train" if role == "actor_train" else "infer"
    view = case.view(process.world_size // case.model_parallel_size, role)
    strategy = STRATEGIES[f"{case.engine}_{kind}"].load_model()(view, process)
    strategy.initialize()
    return strategy


def at_rest(strategy: Any) -> bool:
    """Return True where no router of the model holds anything of a session."""
    if isinstance(strategy.backend.model.routers[0], list):
        megatron_cpu.install()
        from megatron.core.transformer.moe.router_replay import RouterReplay

        routers = [router for chunk in strategy.backend.model.routers for router in chunk]
        return not RouterReplay.global_router_replay_instances and not any(router.attached for router in routers)
    return not any(router.attached or router.module._forward_hooks for router in strategy.backend.model.routers)


def run_case(process: ProcessInfo, case: Case, batch: Batch) -> Outcome:
    """Build the strategy, run its step on this rank's shard, return the results to check."""
    strategy = open_strategy(process, case)
    part = shard(batch, strategy.data_parallel_rank, strategy.data_parallel_size)
    before = strategy.compute_log_probs(part) if case.log_probs_first or case.mode == "R2" else None
    result = strategy.train_step(part, step=1)
    weights = dict(exported(strategy))
    outcome = Outcome(
        weights=weights if process.rank == 0 else None,
        held=held_copies(strategy),
        metrics=result.metrics,
        train_counts=result.replay,
        dp_rank=strategy.data_parallel_rank,
        seconds_in_routes=result.seconds_in_routes,
        at_rest=at_rest(strategy),
    )
    if before is not None:
        outcome.log_prob_counts, outcome.load = before.replay, before.load
        assert (before.log_probs_N is not None) == strategy.returns_results
        outcome.log_probs, outcome.entropy = before.log_probs_N, before.entropy_N
    strategy.close()
    return outcome


def held_copies(strategy: Any) -> dict[tuple[Any, ...], str]:
    """Return `Outcome.held`; empty under FSDP2, where ranks hold parts, none twice."""
    if not hasattr(strategy.backend.model, "chunks"):
        return {}
    from megatron.core import parallel_state as mpu

    stage = mpu.get_pipeline_model_parallel_rank()
    dense = (stage, mpu.get_tensor_model_parallel_rank())
    experts = (stage, mpu.get_expert_model_parallel_rank(), mpu.get_expert_tensor_parallel_rank())
    return {
        (*(experts if ".experts." in name else dense), index, name): hashlib.sha256(
            parameter.detach().float().cpu().numpy().tobytes()
        ).hexdigest()
        for index, chunk in enumerate(strategy.backend.model.chunks)
        for name, parameter in chunk.named_parameters()
    }


def assert_copies_agree(outcomes: Sequence[Outcome]) -> None:
    """Assert equal updates of all copies on data-parallel ranks; an export reads one of them."""
    seen: dict[tuple[Any, ...], str] = {}
    for outcome in outcomes:
        for key, digest in outcome.held.items():
            assert seen.setdefault(key, digest) == digest, key


def written_while_it_trains(strategy: Any, path: Path, train: Callable[[], Any]) -> Any:
    """Return the result of `train`, and write three snapshots taken before it: one before, one during, one after it.

    The first goes to `path`, the others next to it. All three hold the same tensors to the bit.
    """
    now, beside, after = strategy.snapshot(), strategy.snapshot(), strategy.snapshot()
    now.write(path)
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(beside.write, path.with_name("beside"))
        outcome = train()
        writing.result()
    after.write(path.with_name("after"))
    for name in ("beside", "after"):
        assert_same_tensors(path.with_name(name), path)
    return outcome


def assert_same_tensors(found: Path, wanted: Path) -> None:
    """Assert the same files with the same tensors to the bit; the order of a file's header is arbitrary."""
    from safetensors.torch import load_file

    assert sorted(file.name for file in found.iterdir()) == sorted(file.name for file in wanted.iterdir())
    for file in wanted.iterdir():
        theirs, ours = load_file(found / file.name), load_file(file)
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8)), (found, name)


def exported(strategy: Any) -> list[tuple[str, npt.NDArray[np.float32]]]:
    return [(name, tensor.float().cpu().numpy().copy()) for name, tensor in strategy.export_weights()]


def read_weights(checkpoint: str | Path) -> Weights:
    from safetensors.torch import load_file

    files = sorted(Path(checkpoint).glob("*.safetensors"))
    return {name: tensor.float().numpy() for file in files for name, tensor in load_file(file).items()}


def gradients(before: Weights, after: Weights) -> Weights:
    """Return the gradients behind a step of the weights, see `GRADIENT`."""
    assert set(before) == set(after)
    steps = {name: before[name].astype(np.float64) - after[name] for name in before}
    return {name: (step / (1 - np.abs(step) / STEEP)).astype(np.float32) for name, step in steps.items()}


def assert_load(load: ExpertLoad, chosen: Sequence[npt.NDArray[np.int64]]) -> None:
    """Assert the shares of every expert in every layer, on both sides.

    Args:
        chosen: ids of each side, [layers, tokens, experts per token].
    """
    for counts_ME, ids in zip(load.counts_2ME, chosen, strict=True):
        wanted = np.stack([np.bincount(rows.ravel(), minlength=counts_ME.shape[1]) for rows in ids])
        times = counts_ME.sum() // wanted.sum()  # ranks with the same tokens
        assert times >= 1
        assert np.array_equal(counts_ME, times * wanted)


def largest_difference(a: Weights, b: Weights) -> float:
    assert set(a) == set(b)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# The reference


def _dropped(batch: Batch, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dropped tokens, bool [N, V]; true where values exist, bool [N])."""
    total = int(batch.lengths_n.sum())
    dropped_NV, has_set_N = torch.zeros(total, vocab_size, dtype=torch.bool), torch.ones(total, dtype=torch.bool)
    if batch.kept is not None:
        ids = iter(batch.kept.ids_J.tolist())
        for row, count in enumerate(batch.kept.counts_S.tolist()):
            has_set_N[row] = count > 0
            dropped_NV[row] = count > 0
            dropped_NV[row, [next(ids) for _ in range(count)]] = False
    return dropped_NV, has_set_N


@cache
def _load_reference(checkpoint: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return with_one_epsilon(model)


class Reference:
    """Transformers' model with forced routers."""

    def __init__(self, checkpoint: str, temperature: float = 0.7) -> None:
        self.model = copy.deepcopy(_load_reference(checkpoint))
        self.model.model.embed_tokens.padding_idx = None  # some models give this token no gradient
        self.temperature = temperature
        self._forced: RoutedExperts | None = None
        self._live: list[torch.Tensor] = []
        self.moe_layers = read_facts(checkpoint).moe_layers
        for row, layer in enumerate(self.moe_layers):
            gate = self.model.model.layers[layer].mlp.gate
            gate.forward = self._gate(gate, type(gate).forward, row)

    def _gate(self, gate: Any, native: Any, row: int) -> Any:
        config = self.model.config
        sigmoid = config.model_type == "deepseek_v3"
        renormalised = config.model_type == "mixtral" or config.norm_topk_prob

        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
            chosen = native(gate, hidden)[2]
            self._live.append(chosen)
            if self._forced is not None:
                recorded = torch.from_numpy(self._forced.ids_MRK[row].astype(np.int64))
                known = self._forced.known_R
                which = torch.ones(len(recorded), dtype=torch.bool) if known is None else torch.from_numpy(known)
                chosen = torch.where(which[:, None], recorded, chosen)
            gates = (logits.sigmoid() if sigmoid else logits.softmax(-1)).gather(1, chosen)
            if renormalised:
                gates = gates / gates.sum(-1, keepdim=True)
            return logits, gates * (config.routed_scaling_factor if sigmoid else 1.0), chosen

        return forward

    def tokens(self, batch: Batch, *, replay: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the labels [N] and entropies [N], sample by sample.

        Both are over the sets of kept tokens if the batch has some, then 0 without a set.
        """
        log_probs, entropies = [], []
        offsets = batch.offsets
        dropped_NV, has_set_N = _dropped(batch, self.model.config.vocab_size)
        for i in range(batch.num_samples):
            self._forced = batch.routes[i] if replay and batch.routes is not None else None  # type: ignore[assignment]
            ids = torch.from_numpy(batch.input_ids_N[offsets[i] : offsets[i + 1]])
            labels = torch.from_numpy(batch.labels_N[offsets[i] : offsets[i + 1]])
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0].float() / self.temperature
            rows = slice(offsets[i], offsets[i + 1])
            whole = logits.masked_fill(dropped_NV[rows], -1e9).log_softmax(-1)
            log_probs.append(whole.gather(1, labels[:, None])[:, 0] * has_set_N[rows])
            entropies.append(-(whole.exp() * whole).sum(-1) * has_set_N[rows])
        return torch.cat(log_probs), torch.cat(entropies)

    @torch.no_grad()
    def live_routes(self, batch: Batch, *, replay: bool = False) -> tuple[RoutedExperts, ...]:
        """Return the routers' own choice at each input, with the given routes replayed or not."""
        self._live = []
        layers = len(self.moe_layers)
        self.tokens(batch, replay=replay)
        return tuple(
            RoutedExperts(torch.stack(self._live[i * layers : (i + 1) * layers]).numpy().astype(np.uint8))
            for i in range(batch.num_samples)
        )

    def loss(self, batch: Batch, config: RLVRConfig, *, replay: bool) -> torch.Tensor:
        """Return the clipped loss with a clamped k3 KL term and an entropy bonus, in the configured mode."""
        log_probs, entropies = self.tokens(batch, replay=replay)
        old, advantages = torch.from_numpy(batch.old_log_probs_N), torch.from_numpy(batch.advantages_N)
        ratio = (log_probs - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = loss * torch.from_numpy(batch.pg_weights_N)
        if config.use_kl_loss:
            gap = torch.from_numpy(batch.ref_log_probs_N) - log_probs
            loss = loss + config.kl_loss_coef * (gap.exp() - 1 - gap).clamp(max=10)
        loss = loss - config.entropy_loss_coef * entropies
        masks = torch.from_numpy(batch.loss_mask_N).split(batch.lengths_n.tolist())
        kept = [part[m] for part, m in zip(loss.split(batch.lengths_n.tolist()), masks, strict=True) if m.any()]
        if config.loss_agg_mode == "token-mean":
            return torch.cat(kept).mean()
        if config.loss_agg_mode == "seq-mean-token-mean":
            return torch.stack([part.mean() for part in kept]).mean()
        sums = torch.stack([part.sum() for part in kept]).mean()
        return sums if config.loss_agg_mode == "seq-mean-token-sum" else sums / config.response_length

    def gradients(self, batch: Batch, config: RLVRConfig, *, replay: bool = True) -> Weights:
        self.model.zero_grad()
        self.loss(batch, config, replay=replay).backward()
        return self._file_names({name: p.grad for name, p in self.model.named_parameters()})

    def train(self, batches: Sequence[Batch], config: RLVRConfig, *, replay: bool = True) -> Weights:
        """Make clipped AdamW steps."""
        args = config.actor_train.training_args
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )
        for batch in batches:
            optimizer.zero_grad()
            self.loss(batch, config, replay=replay).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            optimizer.step()
        return self._file_names({name: p.data for name, p in self.model.named_parameters()})

    def _file_names(self, tensors: dict[str, Any]) -> Weights:
        """Return transformers' fused experts under the names of the checkpoint's file."""
        out: Weights = {}
        for name, tensor in tensors.items():
            array = np.zeros(0) if tensor is None else tensor.detach().numpy().copy()
            stem = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
            for e in range(len(array)) if ".mlp.experts." in name else ():
                if name.endswith("gate_up_proj"):
                    out[f"{stem}.{e}.gate_proj.weight"], out[f"{stem}.{e}.up_proj.weight"] = np.split(array[e], 2)
                else:
                    out[f"{stem}.{e}.down_proj.weight"] = array[e]
            if ".mlp.experts." not in name:
                out[name] = array
        if self.model.config.model_type == "mixtral":
            for new, old in {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
                out = {name.replace(f".{old}.", f".{new}."): array for name, array in out.items()}
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # no gradient moves it
                out[name] = np.zeros(buffer.shape, np.float32)
        return out
