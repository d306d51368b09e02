"""Every pair of choices of a training layout, met in real processes: gradients, loss and routing against the reference.

The mixes are drawn by `matrix.draw`. Each runs a pass for log-probabilities and a training step with its audit on, and
is compared with transformers' model, one sample at a time, in one process, with its routers forced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from compatibility import Compatibility
from distributed import Gang
from matrix import DIMENSIONS, MODELS, Mix, Sizes, case_of, draw, name_of, pairs, possible
from megatron_cases import (
    Reference,
    gradients,
    largest_difference,
    make_batch,
    make_model,
    read_weights,
    run_case,
)

from roll_r3.models.facts import read_facts

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TOLERANCE = 1e-6


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.mark.parametrize("mix", draw(), ids=name_of)
def test_a_mix_equals_the_reference(
    mix: Mix, gang: Gangs, models: dict[str, Path], compatibility: Compatibility
) -> None:
    checkpoint = models[mix["model"]]
    case = case_of(mix, checkpoint)
    size = Sizes.of(mix)
    batch = make_batch(checkpoint=checkpoint, unknown=0.3 if "unknown" in mix["replay"] else 0.0)
    reference = Reference(str(checkpoint))
    given, expected = batch, batch
    if case.mode == "R2":
        given = replace(batch, routes=None)
        expected = replace(batch, routes=reference.live_routes(batch))

    outcomes = gang(size.processes).run(run_case, case, given)

    config = case.config(size.dp)
    wanted = reference.gradients(expected, config)
    difference = largest_difference(gradients(read_weights(checkpoint), outcomes[0].weights), wanted)
    loss = float(reference.loss(expected, config, replay=True))
    loss_off = abs(outcomes[0].metrics["actor/total_loss"] - loss)
    counts = outcomes[0].train_counts
    print(
        f"{name_of(mix)}: |gradient - reference| {difference:.1e}, |loss - reference| {loss_off:.1e}, "
        f"routing {counts.audit_equal} of {counts.audited}"
    )
    assert difference < TOLERANCE
    assert loss_off < TOLERANCE * max(1.0, abs(loss))
    layers = len(read_facts(checkpoint).moe_layers)
    known = np.concatenate(
        [
            np.ones(n, bool) if r.known_R is None else r.known_R
            for n, r in zip(batch.lengths_n, batch.routes, strict=True)
        ]
    )
    assert counts.audit_equal == counts.audited >= known.sum() * layers
    assert counts.trainable_replayed == (batch.loss_mask_N & known).sum() * layers
    assert counts.missing == (~known).sum() * layers
    assert all(outcome.at_rest for outcome in outcomes)
    assert len({outcome.digest for outcome in outcomes}) == 1  # every rank exports the same
    wanted_log_probs = reference.tokens(expected, replay=True)[0].detach().numpy()
    offsets, seen = batch.offsets, 0
    for outcome in outcomes:
        if outcome.log_probs is not None:
            own = np.arange(batch.num_samples)[outcome.dp_rank :: size.dp]
            part = np.concatenate([wanted_log_probs[offsets[i] : offsets[i + 1]] for i in own])
            assert np.abs(outcome.log_probs - part).max() < 1e-5
            seen += len(own)
    assert seen == batch.num_samples
    compatibility.ran(mix)


def test_every_possible_pair_meets() -> None:
    """A pair that no mix holds is one that `possible` excludes, whatever the rest is."""
    met = set().union(*(pairs(mix) for mix in draw()))
    for one, other in combinations(DIMENSIONS, 2):
        for first in DIMENSIONS[one]:
            for second in DIMENSIONS[other]:
                if tuple(sorted([(one, first), (other, second)])) in met:
                    continue
                plain = {name: choices[0] for name, choices in DIMENSIONS.items()}
                sizes = [
                    {"TP": tp, "DP": dp, "CP": cp, "EP": ep, "ETP": etp, "PP": pp}
                    for tp in DIMENSIONS["TP"]
                    for dp in DIMENSIONS["DP"]
                    for cp in DIMENSIONS["CP"]
                    for ep in DIMENSIONS["EP"]
                    for etp in DIMENSIONS["ETP"]
                    for pp in DIMENSIONS["PP"]
                ]
                assert not any(possible({**plain, **size, one: first, other: second}) for size in sizes), (
                    first,
                    second,
                )


def test_the_matrix_is_large_enough() -> None:
    mixes = draw()
    assert len(mixes) >= 25
    assert {choice for mix in mixes for choice in mix.items()} == {(n, c) for n, cs in DIMENSIONS.items() for c in cs}
    assert max(Sizes.of(mix).processes for mix in mixes) == 4
