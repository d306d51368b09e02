"""Every pair of training-layout choices in real processes: gradients, loss and routing against the reference.

The mixes are drawn by `matrix.draw`. Each runs a pass for log-probabilities and an audited training step. The reference
is transformers' model in one process, one sample at a time, with its routers forced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from compatibility import Compatibility, layouts_on_the_page, write_page
from distributed import Gang
from matrix import DIMENSIONS, REFUSED, REFUSED_MODELS, Mix, Sizes, case_of, draw, name_of, pairs, possible
from megatron_cases import (
    Reference,
    assert_copies_agree,
    gradients,
    largest_difference,
    make_batch,
    read_weights,
    run_case,
)

from roll_r3.config.load import load
from roll_r3.config.rules import check_rules
from roll_r3.config.rules.example import MINIMAL
from roll_r3.errors import ConfigError
from roll_r3.models.facts import read_facts
from roll_r3.models.tiny import make_tiny_checkpoint
from roll_r3.platform import megatron_cpu

pytestmark = pytest.mark.integration
Gangs = Callable[[int], Gang]

TOLERANCE = 1e-6


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
    loss_off = abs(outcomes[0].metrics["actor/loss"] - loss)
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
    assert_copies_agree(outcomes)
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


@pytest.mark.parametrize("what", REFUSED)
def test_a_configuration_is_refused(what: str, tmp_path: Path, compatibility: Compatibility) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    names = {"train": "actor_train.strategy_args.strategy_config", "devices": "actor_train.device_mapping"}
    overrides = [
        override.replace("{train}", names["train"]).replace("{devices}", names["devices"]) for override in REFUSED[what]
    ]
    assert not check_rules(load(tmp_path / "run.yaml").config)
    found = [f for f in check_rules(load(tmp_path / "run.yaml", overrides).config) if f.severity == "error"]
    assert found
    compatibility.refused[what] = f"`{found[0].rule}`"


@pytest.mark.parametrize("what", REFUSED_MODELS)
def test_a_checkpoint_is_refused(what: str, tmp_path: Path, compatibility: Compatibility) -> None:
    megatron_cpu.install()
    from roll_r3.trainers.megatron.bridge import open_bridge

    name, fields = REFUSED_MODELS[what]
    make_tiny_checkpoint(tmp_path, name)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(ConfigError, match="cannot be built with megatron-core") as refused:
        open_bridge(str(tmp_path), dtype=torch.float32, tp_size=1, transformer_engine=False)
    compatibility.refused[f"{name}: {what}"] = str(refused.value).partition("megatron-core: ")[2]


def test_the_page_says_what_ran(compatibility: Compatibility, request: pytest.FixtureRequest) -> None:
    """Compare docs/compatibility.md with this session's results; `make compatibility` writes it."""
    if len(compatibility.mixes) < len(draw()) or len(compatibility.refused) < len(REFUSED) + len(REFUSED_MODELS):
        pytest.skip("needs the whole file to run, and to pass")
    if request.config.getoption("--write-compatibility"):
        write_page(compatibility.render())
    assert layouts_on_the_page() == compatibility.render(), "run make compatibility"


def test_every_possible_pair_meets() -> None:
    """Check that `possible` excludes every pair without a mix, in any combination with other choices."""
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
