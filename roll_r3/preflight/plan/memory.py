"""Bytes on a device of a pipeline stage, computed, not measured on a GPU.

Weights, gradients and optimizer state are exact except for the padding of shards. Adam with fp32 masters under bf16
takes 2 + 4 + 12 bytes per parameter (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1; gradients are fp32 here).
The distributed optimizer divides the 12 bytes over data- and context-parallel ranks, for experts over their copies.
Activations are an estimate (see `activations`). The share of the logits is the allocation of the loss.

Not counted: the device's context, communication buffers, temporaries of backward other than the logits', fragmentation,
and routes (they are on the host; a micro-batch's rows are small). Activations assume fused kernels. Plain PyTorch
layers, used without TransformerEngine, were measured to keep about twice as much; latent attention about five times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roll_r3.batch.token_map import round_up
from roll_r3.config.derived import MegatronWorker, layout
from roll_r3.config.workers import ActorTrainConfig
from roll_r3.models.size import Held, Shape, vocab_columns
from roll_r3.preflight.plan.activations import LayerCost
from roll_r3.preflight.plan.in_flight import in_flight
from roll_r3.preflight.plan.ranks import Grid
from roll_r3.preflight.plan.step import Passes

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}
"""Precision, as trainers and engines name it -> bytes of a parameter."""
_GRADIENT, _MOMENTS, _MASTER = 4, 8, 4
"""Bytes per parameter; a master copy is kept unless the parameter is fp32."""
_FORWARD_LOGITS, _BACKWARD_LOGITS = 4 * 4, 6 * 4
"""Bytes per logit: fp32 copies of the loss, next to the model's own logits; and those in the backward of an entropy
term, after the model's logits are freed."""


def logit_bytes(element: int, *, entropy_gradient: bool) -> int:
    """Return the maximum bytes per logit in the loss.

    Args:
        element: bytes of a logit in the model's output.
        entropy_gradient: True if the loss has an entropy term.
    """
    return max(element + _FORWARD_LOGITS, _BACKWARD_LOGITS if entropy_gradient else 0)


@dataclass(frozen=True)
class StageMemory:
    """Computed bytes on each device of a pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Maximum kept for backward."""
    in_flight: tuple[int, ...]
    """Number of micro-batches of each chunk in flight at that moment."""
    recomputed: int
    """Activations of one micro-batch that backward recomputes."""
    logits: int
    """Logits of one micro-batch and copies in the loss; 0 except on the last stage."""
    no_gradient_pass: int
    """Maximum of a pass for log-probabilities: one layer's activations, or the logits; 0 without such a pass."""

    @property
    def total(self) -> int:
        """Maximum at once. Logits are freed before the first layer is recomputed; passes do not overlap."""
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
    """Compute the bytes on a device of one stage.

    Args:
        held: parameters of every stage and chunk (see `held_parameters`).
        passes: micro-batches of the role.
        entropy_gradient: True if the loss has an entropy term.
        fp32_lm_head: True for fp32 logits and an fp32 copy of the output layer's weight.
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
