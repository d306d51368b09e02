"""Bytes on a device, estimated: what a rank of a pipeline stage holds, and what it needs besides while it computes.

Weights, gradients and optimizer state are exact but for the padding of shards: Adam with fp32 masters under bf16 takes
2 + 4 + 12 bytes a parameter (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1; gradients are fp32 here), of which
the distributed optimizer shares the last out over data- and context-parallel ranks, those of experts over the copies of
each. Activations are an estimate (see `activations`), the logits' share is what the loss allocates.

Left out: the device's context, communication buffers, temporaries of backward other than the logits', what the
allocator cannot reuse, and routes (the host holds them; a micro-batch's rows are small). Activations are those of fused
kernels: plain PyTorch layers, which run without TransformerEngine, were measured to keep about twice as much, those of
latent attention about five times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roll_r3.batch.token_map import round_up
from roll_r3.config.derived import MegatronWorker, layout
from roll_r3.config.workers import ActorTrainConfig
from roll_r3.models.size import Held, Shape, vocab_columns
from roll_r3.preflight.activations import LayerCost
from roll_r3.preflight.in_flight import in_flight
from roll_r3.preflight.ranks import Grid
from roll_r3.preflight.step import Passes

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}
"""Of a parameter, by the names that trainer and engine have for its precision."""
_GRADIENT, _MOMENTS, _MASTER = 4, 8, 4
"""Bytes a parameter; a master is kept where the parameter itself is no fp32."""
_FORWARD_LOGITS, _BACKWARD_LOGITS = 4 * 4, 6 * 4
"""Bytes a logit: the loss's fp32 copies while the model's own logits are there, and under an entropy term those of its
backward, when they are gone."""


def logit_bytes(element: int, *, entropy_gradient: bool) -> int:
    """Bytes that the loss takes for each logit, at the most.

    Args:
        element: bytes of a logit as the model gives it.
        entropy_gradient: the loss has an entropy term.
    """
    return max(element + _FORWARD_LOGITS, _BACKWARD_LOGITS if entropy_gradient else 0)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device of a pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for backward, when most is."""
    in_flight: tuple[int, ...]
    """Micro-batches of each chunk under way at that moment."""
    recomputed: int
    """What backward computes again of one micro-batch before it uses it."""
    logits: int
    """Of one micro-batch, with the loss's copies; 0 but on the last stage."""
    no_gradient_pass: int
    """The most that a pass for log-probabilities needs: one layer's activations, or the logits; 0 without one."""

    @property
    def total(self) -> int:
        """The most at once. Logits are gone before the first layer is recomputed; passes do not overlap."""
        training = self.activations + max(self.recomputed, self.logits)
        return self.weights + self.gradients + self.optimizer + max(training, self.no_gradient_pass)


def stage_memory(
    worker: MegatronWorker,
    shape: Shape,
    held: Sequence[Sequence[Held]],
    stage: int,
    passes: Passes,
    *,
    entropy_gradient: bool,
    fp32_lm_head: bool = False,
) -> StageMemory:
    """What a device of one stage needs.

    Args:
        held: of every stage and chunk (see `held_parameters`).
        passes: micro-batches of the role.
        entropy_gradient: the loss has an entropy term.
        fp32_lm_head: logits are fp32, and so is a copy of the output layer's weight.
    """
    grid, settings = Grid.of(worker), layout(worker)
    element = ELEMENT_BYTES[worker.model_args.dtype]
    dense = sum(chunk.dense for chunk in held[stage])
    experts = sum(chunk.experts for chunk in held[stage])
    weights = (dense + experts) * element
    columns = vocab_columns(shape, grid.tp) if stage == len(held) - 1 else 0

    def cost(tokens: int) -> LayerCost:
        return LayerCost(shape, grid, settings, tokens // grid.cp, element)

    def logits(tokens: int, *, entropy_gradient: bool) -> int:
        copy = columns * shape.hidden * 4 if fp32_lm_head and element != 4 else 0
        each = logit_bytes(4 if fp32_lm_head else element, entropy_gradient=entropy_gradient)
        return tokens // grid.cp * columns * each + copy

    without = 0
    if passes.infer is not None:
        plain = cost(passes.infer.tokens)
        layers = [sum(k.size for k in plain.kept(layer)) for chunk in held[stage] for layer in chunk.layers]
        without = max([*layers, logits(passes.infer.tokens, entropy_gradient=False)])
    if passes.train is None or not isinstance(worker, ActorTrainConfig):
        return StageMemory(weights, 0, 0, 0, (), 0, 0, without)
    trained = cost(passes.train.tokens)
    chunks = [trained.chunk(chunk.layers) for chunk in held[stage]]
    stored = [chunk.stored for chunk in chunks]
    if columns:  # inputs of the last norm and of the output layer
        stored[-1] += 2 * trained.layer_input
    micro_batches = in_flight(stage, len(held), stored, passes.train.number)
    owned = dense + experts
    if settings.use_distributed_optimizer:
        owned = round_up(dense, grid.dp * grid.cp) // (grid.dp * grid.cp) + round_up(experts, grid.edp) // grid.edp
    return StageMemory(
        weights=weights,
        gradients=(dense + experts) * _GRADIENT,
        optimizer=owned * (_MOMENTS + (_MASTER if element != 4 else 0)),
        activations=sum(number * size for number, size in zip(micro_batches, stored, strict=True)),
        in_flight=micro_batches,
        recomputed=max(chunk.recomputed for chunk in chunks),
        logits=logits(passes.train.tokens, entropy_gradient=entropy_gradient),
        no_gradient_pass=without,
    )
