"""Wire form of routes: bytes per token against the theoretical minimum, and speed against a plain copy.

    .venv/bin/python -m examples.benchmarks route_wire

The minimum: a uniform router over E experts has an entropy of log2 C(E, K) bits per token and layer, and of
log2 E!/(E-K)! with the order of the K, kept by the format. No coding takes less on average (Shannon, 1948).
"""

from __future__ import annotations

import base64
from math import comb, log2, perm

import numpy as np

from examples.benchmarks.measuring import Report, bytes_of, facts, in_turn, random_group, ratio, rounded, timed
from roll_r3.batch import wire
from roll_r3.batch.routes import RoutedExperts
from roll_r3.models.facts import ModelFacts
from roll_r3.replay.checks import compact_routes

MODELS = (
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V3",
    "moonshotai/Moonlight-16B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
)
SPEED_OF = MODELS[0]
SAMPLES = 8
"""Samples per group. A quarter of the rows of each is the shared prompt."""
TOKENS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
"""Rows of all samples of a group, shared ones counted for each."""
STAGES = (1, 2, 4, 8)


def measure(rounds: int) -> Report:
    """Measure all figures."""
    model = facts(SPEED_OF)
    return {
        "sizes": [sizes(name) for name in MODELS],
        "answer": answer_speed(model, rows=4096, rounds=rounds),
        "speeds_of": SPEED_OF,
        "growth": [speeds(model, tokens, stages=2, rounds=rounds) for tokens in TOKENS],
        "stages": [speeds(model, 1 << 16, stages, rounds) for stages in STAGES],
    }


def least_bits(model: ModelFacts) -> tuple[float, float]:
    """Return the bits per token of uniform routes over all MoE layers: of the sets alone, and with their order."""
    layers, experts, top_k = len(model.moe_layers), model.num_experts, model.top_k
    return layers * log2(comb(experts, top_k)), layers * log2(perm(experts, top_k))


def sizes(name: str) -> Report:
    """Return bytes per token: of the encoding, of engines' answers, and the minimum."""
    model = facts(name)
    samples = group(model, 8 * 4096)
    alone, together = wire.encode(samples[:1], model.num_experts), wire.encode(samples, model.num_experts)
    rows = samples[0].num_rows
    stored = sum(wire.EncodedGroup(together).stored_rows)
    set_bytes, ordered_bytes = (bits / 8 for bits in least_bits(model))
    int32 = 4 * model.num_layers * model.top_k
    return {
        "model": name,
        "moe_layers": len(model.moe_layers),
        "experts": model.num_experts,
        "top_k": model.top_k,
        "bytes_per_token": rounded(len(alone) / rows),
        "bytes_per_token_of_a_group": rounded(len(together) / (rows * SAMPLES)),
        "engine_int32_bytes_per_token": int32,
        "engine_base64_bytes_per_token": rounded(int32 * 4 / 3),
        "least_bytes_ordered": rounded(ordered_bytes),
        "least_bytes_of_sets": rounded(set_bytes),
        "over_least_ordered": rounded(len(together) / stored / ordered_bytes),
        "over_least_of_sets": rounded(len(together) / stored / set_bytes),
    }


def answer_speed(model: ModelFacts, rows: int, rounds: int) -> Report:
    """Measure checking and compacting an engine's answer, against a plain conversion of the same ids."""
    (sample,) = random_group(model, 1, 0, rows)
    ids_RLK = np.zeros((rows, model.num_layers, model.top_k), np.int32)
    ids_RLK[:, list(model.moe_layers)] = sample.ids_MRK.transpose(1, 0, 2)
    text = base64.b64encode(ids_RLK.data).decode()

    def compact() -> RoutedExperts:
        return compact_routes(
            ids_RLK,
            num_rows=rows,
            num_layers=model.num_layers,
            moe_layers=model.moe_layers,
            num_experts=model.num_experts,
            top_k=model.top_k,
        )

    seconds = in_turn(
        {
            "compact": timed(compact),
            "convert": timed(lambda: ids_RLK.astype(np.uint8)),
            "base64": timed(lambda: base64.b64decode(text, validate=True)),
        },
        rounds,
    )
    return {
        "rows": rows,
        "compact_over_convert": ratio(seconds["compact"], seconds["convert"]),
        "compact_over_base64": ratio(seconds["compact"], seconds["base64"]),
    }


def group(model: ModelFacts, tokens: int) -> list[RoutedExperts]:
    each = tokens // SAMPLES
    return random_group(model, SAMPLES, each // 4, each - each // 4)


def speeds(model: ModelFacts, tokens: int, stages: int, rounds: int) -> Report:
    """Measure writing a group, reading all of it, and a stage's checked view, each against a copy of as many bytes.

    Args:
        tokens: number of tokens of all samples together.
        stages: pipeline stages; the view is the first stage's.
    """
    samples = group(model, tokens)
    encoded = wire.encode(samples, model.num_experts)
    opened = wire.EncodedGroup(encoded)
    ids = encoded[-opened.num_layers * opened.row_bytes * sum(opened.stored_rows) :]
    layers, everyone = range(opened.num_layers // stages), range(SAMPLES)
    of_stage = ids[: len(layers) * len(ids) // opened.num_layers]
    # what comes out of `decode`: the shared rows once for each sample
    whole = bytes_of(np.concatenate([sample.ids_MRK.reshape(-1) for sample in samples]))
    seconds = in_turn(
        {
            "encode": timed(lambda: wire.encode(samples, model.num_experts)),
            "copy": timed(ids.copy),
            "decode": timed(lambda: wire.decode(encoded)),
            "copy_whole": timed(whole.copy),
            "view": timed(lambda: wire.EncodedGroup(encoded).view(layers, everyone)),
            "copy_stage": timed(of_stage.copy),
        },
        rounds,
    )
    return {
        "tokens": tokens,
        "stages": stages,
        "bytes_over_rows": rounded(len(encoded) / len(ids)),
        "encode_over_copy": ratio(seconds["encode"], seconds["copy"]),
        "decode_over_copy": ratio(seconds["decode"], seconds["copy_whole"]),
        "view_over_copy": ratio(seconds["view"], seconds["copy_stage"]),
        "GB_per_s": {
            "copy": _speed(len(ids), seconds["copy"]),
            "encode": _speed(len(ids), seconds["encode"]),
            "decode": _speed(len(whole), seconds["decode"]),
            "view": _speed(len(of_stage), seconds["view"]),
        },
    }


def _speed(nbytes: int, seconds: list[float]) -> float:
    return rounded(nbytes / float(np.median(seconds)) / 1e9)
