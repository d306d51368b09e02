"""Decoder layers of each pipeline stage and model chunk: megatron-core's placement, without importing it.

The chunks of a pipeline form one line: chunk 0 of every stage, then chunk 1 of every stage, and so on. Layers follow
this line in order, so the number of layers of each chunk determines the placement.
"""

from __future__ import annotations

from itertools import accumulate

from roll_r3.config.findings.report import show_value
from roll_r3.config.pipeline_layout import parse_pipeline_layout
from roll_r3.config.strategies import MegatronConfig

ChunkLayers = tuple[tuple[tuple[int, ...], ...], ...]
"""[stage][chunk] -> global decoder layers, from 0, ascending; a chunk may have none."""


def chunk_layers(num_layers: int, config: MegatronConfig) -> ChunkLayers:
    """Return the decoder layers of every chunk of every pipeline stage.

    Args:
        num_layers: number of decoder layers of the model, dense ones included.

    Raises:
        ValueError: the layers cannot be placed; the text starts with the field to change.
    """
    stages, chunks = config.pipeline_model_parallel_size, config.chunks_per_stage or 1
    if chunks > 1 and stages == 1:
        raise ValueError(f"pipeline_model_parallel_size: must be 2 or more for {chunks} interleaved chunks, got 1")
    if config.pipeline_model_parallel_layout is not None:
        sizes = _written_sizes(num_layers, config.pipeline_model_parallel_layout, stages, chunks)
    elif config.num_layers_in_first_pipeline_stage or config.num_layers_in_last_pipeline_stage:
        sizes = _uneven_sizes(num_layers, config, chunks) * chunks
    else:
        sizes = _even_sizes(num_layers, config, chunks)
    ends = list(accumulate(sizes))
    line = [tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return tuple(tuple(line[stage::stages]) for stage in range(stages))


def _written_sizes(num_layers: int, text: str, stages: int, chunks: int) -> list[int]:
    """Return the number of layers of each chunk of the line, from the layout text."""
    field = "pipeline_model_parallel_layout"
    written = [letters.count("t") for letters in parse_pipeline_layout(text)]
    if len(written) != stages * chunks:
        raise ValueError(
            f"{field}: {show_value(text)!r} has {len(written)} stages, but pipeline_model_parallel_size {stages} x "
            f"virtual_pipeline_model_parallel_size {chunks} are needed"
        )
    if sum(written) != num_layers:
        raise ValueError(
            f"{field}: {show_value(text)!r} places {sum(written)} decoder layers, but the model has {num_layers}"
        )
    return written


def _uneven_sizes(num_layers: int, config: MegatronConfig, chunks: int) -> list[int]:
    """Return the number of layers of a chunk of each stage, with a number of their own for the first or last stage."""
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    given = [size for size in (first, last) if size is not None]
    middle_layers, middle_stages = num_layers - sum(given), config.pipeline_model_parallel_size - len(given)
    field = f"num_layers_in_{'first' if first else 'last'}_pipeline_stage"
    if middle_stages < 0 or middle_layers < 0 or (middle_layers > 0) != (middle_stages > 0):
        raise ValueError(
            f"{field}: of {num_layers} layers {middle_layers} remain for the {middle_stages} other stages; "
            "change it, or pipeline_model_parallel_size"
        )
    if middle_stages == 0 and config.chunks_per_stage and len(given) == 2:
        raise ValueError(
            f"{field}: megatron-core cannot interleave two stages that both have their own number of layers; "
            "remove one of the two, or write pipeline_model_parallel_layout"
        )
    if middle_stages and middle_layers % middle_stages:
        raise ValueError(
            f"{field}: the remaining {middle_layers} layers do not divide over {middle_stages} stages; change it, or "
            "pipeline_model_parallel_size"
        )
    middle = [middle_layers // middle_stages] * middle_stages if middle_stages else []
    sizes = [*([first] if first else []), *middle, *([last] if last else [])]
    if uneven := [size for size in sizes if size % chunks]:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size: the {uneven[0]} layers of a stage do not divide into {chunks} "
            "chunks; change it, or write pipeline_model_parallel_layout"
        )
    return [size // chunks for size in sizes]


def _even_sizes(num_layers: int, config: MegatronConfig, chunks: int) -> list[int]:
    """Return equal numbers of layers for all chunks; embedding and loss may count as a layer."""
    stages = config.pipeline_model_parallel_size
    embedding, loss = config.account_for_embedding_in_pipeline_split, config.account_for_loss_in_pipeline_split
    counted = num_layers + embedding + loss
    if counted % (stages * chunks):
        what = " and ".join(name for name, on in (("the embedding", embedding), ("the loss", loss)) if on)
        raise ValueError(
            f"pipeline_model_parallel_size: {num_layers} layers{f' with {what}' if what else ''} do not divide over "
            f"{stages} stages x {chunks} chunks: choose other sizes, num_layers_in_first_pipeline_stage / "
            "num_layers_in_last_pipeline_stage, or pipeline_model_parallel_layout"
        )
    sizes = [counted // (stages * chunks)] * (stages * chunks)
    sizes[0] -= embedding
    sizes[-1] -= loss
    return sizes
