"""Findings about ROLL's keys: one note each, with their places, without secrets."""

from __future__ import annotations

from roll_r3.config.findings.report import Origins, render
from roll_r3.from_roll.draft import Draft
from roll_r3.from_roll.translate import translate
from tests.unit.from_roll.cases import ENGINE, MATH, of_roll

NAMES = ("world_size", "infer_batch_size", "backend_timeout", "max_concurrency")


def test_every_note_names_one_key_and_what_it_became():
    _, _, findings = translate(of_roll(dual_clip_loss=True), {})
    (note,) = [f for f in findings if f.path == "dual_clip_loss"]
    assert (note.severity, note.found, note.fix) == ("note", (("dual_clip_loss", True),), "dual_clip_loss: 1.4")
    assert all(len(f.found) == 1 for f in findings if f.rule == "roll-translated")


def test_a_value_that_is_put_at_two_places_can_be_changed_in_one():
    draft = Draft({"old": {"a": [1]}}, {"old": "x:1", "old.a": "x:2", "older": "x:3"})
    for place in ("new", "other"):
        draft.put(place, draft.get("old"), "old")
    draft.get("new")["a"].append(2)
    assert draft.data == {"old": {"a": [1]}, "new": {"a": [1, 2]}, "other": {"a": [1]}}
    assert draft.places == {
        "old": "x:1", "old.a": "x:2", "older": "x:3", "new": "x:1", "new.a": "x:2", "other": "x:1", "other.a": "x:2"
    }  # fmt: skip


def test_places_follow_their_values():
    data = of_roll(
        max_grad_norm=0.3,
        actor_infer__num_gpus_per_worker=4,
        rewards={"sums": {"worker_cls": MATH, "tag_included": ["a"]}},
        actor_train__data_args__tag="source",
    )
    places = {
        "max_grad_norm": "f.yaml:1",
        "actor_infer.num_gpus_per_worker": "override x",
        "rewards.sums.worker_cls": "f.yaml:3",
        "rewards.sums.tag_included.0": "f.yaml:4",
        "actor_train.data_args.tag": "f.yaml:5",
    }
    _, moved, _ = translate(data, places)
    assert moved.items() >= places.items()  # findings name the old keys
    assert moved["actor_train.training_args.max_grad_norm"] == "f.yaml:1"
    assert moved[f"{ENGINE}.tp_size"] == "override x"
    assert moved["rewards.sums.reward"] == "f.yaml:3"
    assert moved["actor_train.data_args.domain"] == "f.yaml:5"
    assert moved["loss_agg_mode"] == "ROLL's default"


def test_values_inside_a_moved_value_keep_their_places():
    data = of_roll(**{f"{ENGINE}.cuda_graph_max_bs": [1, 2]})
    places = {f"{ENGINE}.cuda_graph_max_bs": "f:1", f"{ENGINE}.cuda_graph_max_bs.1": "f:2"}
    _, moved, _ = translate(data, places)
    assert moved[f"{ENGINE}.server_args.cuda_graph_max_bs.1"] == "f:2"


def test_values_of_a_section_are_not_printed():
    data = of_roll(
        tracker_kwargs={"api_key": "hush"},
        rewards__math_rule__judge_api_key="hush",
        reference={"system_envs": {"K": "hush"}},
    )
    _, _, findings = translate(data, {})
    assert {"tracker_kwargs", "rewards.math_rule.judge_api_key", "reference.system_envs"} <= {
        p for f in findings for p, _ in f.found
    }
    assert "hush" not in render(findings, Origins("f.yaml", {}))


def test_a_few_dropped_keys_are_listed_and_many_are_counted():
    few, many = ({f"rewards__math_rule__{name}": 1 for name in names} for names in (NAMES[:3], NAMES))
    for changes, listed in ((few, True), (many, False)):
        _, _, findings = translate(of_roll(**changes), {})
        text = render([f for f in findings if f.rule == "roll-unread"], Origins("f.yaml", {}))
        assert f"{len(changes)} keys of ROLL dropped" in text
        assert ("rewards.math_rule.world_size = 1" in text) == listed
        assert ("--show-dropped" in text) != listed
