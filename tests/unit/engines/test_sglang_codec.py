"""A good answer is read; each violation of its contract is refused with a reason."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.sglang.codec import SglangCodec
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts, facts_of

PROMPT = (5, 6, 7)
RESPONSE = [9, 8, 258]
ROWS, LAYERS, TOP_K, EXPERTS = 5, 3, 2, 16
FACTS: ModelFacts = facts_of(
    {
        "model_type": "deepseek_v3",
        "num_hidden_layers": LAYERS,
        "first_k_dense_replace": 1,  # layer 0 is dense: it comes as zeros and is left out
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_attention_heads": 4,
        "vocab_size": 260,
        "max_position_embeddings": 64,
    }
)


def routes() -> np.ndarray:
    """Layer 0 zeros; layer l, row r: experts (r + l, r + l + 1) modulo 16; all rows and layers differ."""
    ids_RLK = np.zeros((ROWS, LAYERS, TOP_K), np.int32)
    for row in range(ROWS):
        for layer in range(1, LAYERS):
            ids_RLK[row, layer] = [(row + layer) % EXPERTS, (row + layer + 1) % EXPERTS]
    return ids_RLK


def encode(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def answer(**meta: Any) -> dict[str, Any]:
    return {
        "output_ids": RESPONSE,
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 258},
            "prompt_tokens": len(PROMPT),
            "cached_tokens": 2,
            "num_retractions": 0,
            "weight_version": "4",
            "weight_versions": [{"version": "4", "start": 0, "end": 3}],
            "output_token_logprobs": [[-0.5, 9, None], [-1.5, 8, None], [0.0, 258, None]],
            "routed_experts": encode(routes()),
            **meta,
        },
    }


def read_whole(
    value: Any,
    *,
    first_row: int = 0,
    cached_rows: int = 0,
    record_routes: bool = True,
    **sampling: Any,
) -> Sample:
    sample = SampleRequest(
        PROMPT,
        "s",
        0,
        Sampling(**{"max_new_tokens": 8, **sampling}),
        record_routes=record_routes,
        first_row=first_row,
        cached_rows=cached_rows,
    )
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return SglangCodec().read(body, Asked(sample, 4), FACTS)


def read(value: Any, **changes: Any) -> Trajectory:
    return read_whole(value, **changes).trajectory


def test_a_good_answer_becomes_a_trajectory() -> None:
    trajectory = read(answer())
    assert trajectory.response_ids.tolist() == RESPONSE
    assert trajectory.log_probs.tolist() == [-0.5, -1.5, 0.0]
    assert trajectory.finish_reason == "stop"
    assert trajectory.weight_versions == (4,)
    assert trajectory.routes.ids_MRK.dtype == np.uint8
    np.testing.assert_array_equal(trajectory.routes.ids_MRK, routes()[:, 1:].transpose(1, 0, 2))


def test_the_stop_string_that_was_asked_for_may_end_a_response() -> None:
    ended = answer(finish_reason={"type": "stop", "matched": "</answer>"})
    assert read(ended, stop_strings=("x", "</answer>")).finish_reason == "stop"
    with pytest.raises(SampleError, match="'</answer>', which is not a requested stop string"):
        read(ended, stop_strings=("x",))


def test_without_recording_the_answer_needs_no_routes() -> None:
    value = answer()
    del value["meta_info"]["routed_experts"]
    assert read(value, record_routes=False).routes is None


KEPT = {"output_token_sampling_mask": [[9, 4], [8], [7, 258, 3]], "output_token_sampling_logprobs": [-0.25, 0.0, -0.5]}


def test_kept_tokens_come_with_log_probs_over_them() -> None:
    trajectory = read(answer(**KEPT), return_kept=True, top_k=5)
    assert trajectory.log_probs.tolist() == [-0.25, 0.0, -0.5]
    assert trajectory.kept is not None
    assert (trajectory.kept.counts_S.tolist(), trajectory.kept.ids_J.tolist()) == ([2, 1, 3], [9, 4, 8, 7, 258, 3])
    whole = read(answer(**KEPT))
    assert whole.kept is None and whole.log_probs.tolist() == [-0.5, -1.5, 0.0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"output_token_sampling_mask": None}, "must be a list of lists of integers, got None"),
        ({"output_token_sampling_logprobs": [-0.25, 0.0]}, r"zip\(\) argument 2 is longer"),
        ({"output_token_sampling_logprobs": [-0.25, None, 0.0]}, "not numbers"),
        ({"output_token_sampling_logprobs": [-0.25, float("nan"), 0.0]}, "must be finite"),
    ],
)
def test_broken_kept_tokens_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises((SampleError, RouteError), match=why):
        read(answer() | {"meta_info": answer(**KEPT)["meta_info"] | change}, return_kept=True, top_k=5)


def test_an_answer_without_the_kept_tokens_that_were_asked_for_is_refused() -> None:
    with pytest.raises(SampleError, match="output_token_sampling"):
        read(answer(), return_kept=True, top_k=5)


def test_a_release_without_kept_tokens_is_not_asked_for_them() -> None:
    codec = SglangCodec()
    asked = Asked(SampleRequest(PROMPT, "s", 0, Sampling(8, top_k=5, return_kept=True)), 4)
    assert codec.request(asked)["return_sampling_mask"] is True
    whole = Asked(SampleRequest(PROMPT, "s", 0, Sampling(8, top_k=5)), 4)
    assert (codec.kept_limit(asked), codec.kept_limit(whole)) == (5, 0)
    assert asked.most_bytes(FACTS, 5) == asked.most_bytes(FACTS, 0) + 8 * 5 * 2 * 9
    codec.returns_kept = False
    assert "return_sampling_mask" not in codec.request(asked)
    trajectory = codec.read(json.dumps(answer()).encode(), asked, FACTS).trajectory
    assert trajectory.kept is None and trajectory.log_probs.tolist() == [-0.5, -1.5, 0.0]


def test_a_release_without_versions_per_token_is_read() -> None:
    assert read(answer(weight_versions=None)).weight_versions == (4,)


def test_rows_from_the_first_wanted_on_are_read() -> None:
    trajectory = read(answer(routed_experts=encode(routes()[2:])), first_row=2)
    np.testing.assert_array_equal(trajectory.routes.ids_MRK[:, 2:], routes()[2:, 1:].transpose(1, 0, 2))
    assert trajectory.routes.known_R.tolist() == [False, False, True, True, True]
    with pytest.raises(RouteError, match=r"5, 3, 2.*3 rows"):
        read(answer(), first_row=2)


FROM_CACHE = {
    "as much as was hoped for": ({}, True),
    "less": ({"cached_tokens": 1}, False),
    "then lost, and perhaps computed again": ({"num_retractions": 1}, False),
    "a release that does not say whether": ({"num_retractions": None}, False),
}


@pytest.mark.parametrize(("meta", "expected"), FROM_CACHE.values(), ids=FROM_CACHE)
def test_what_came_from_the_cache(meta: dict[str, Any], expected: bool) -> None:
    assert read_whole(answer(**meta), cached_rows=2).from_cache == expected


def test_an_answer_says_nothing_in_the_place_of_its_routes() -> None:
    """Check that exactly the field is cut out of the text before it is parsed."""
    value = answer()
    value["text"] = '"routed_experts": "AAAA" \\" ' * 3
    np.testing.assert_array_equal(read(value).routes.ids_MRK, routes()[:, 1:].transpose(1, 0, 2))
    value["meta_info"] = dict(reversed(value["meta_info"].items()))
    assert read(value).response_ids.tolist() == RESPONSE


def changed(row: int, layer: int, ids: list[int]) -> str:
    ids_RLK = routes()
    ids_RLK[row, layer] = ids
    return encode(ids_RLK)


def lost_layer() -> str:
    ids_RLK = routes()
    ids_RLK[:, 2] = 0
    return encode(ids_RLK)


BAD_ROUTES = {
    "a row too few": (encode(routes()[:-1]), "4, 3, 2.*5 rows"),
    "a row too many": (encode(np.concatenate([routes(), routes()[-1:]])), "6, 3, 2.*5 rows"),
    "a layer too few": (encode(routes()[:, :-1]), "not whole rows"),
    "an id above the range": (changed(1, 2, [3, EXPERTS]), "16 experts"),
    "a negative id": (changed(1, 2, [3, -1]), "-1"),
    "an expert twice": (changed(1, 2, [3, 3]), "twice"),
    "an MoE layer of zeros": (lost_layer(), r"all zeros in MoE layers \[2\]"),
    "not base64": ("?" * 160, "base64"),
    "not whole integers": (base64.b64encode(b"abc").decode(), "3 bytes, not int32"),
    "missing": (None, "missing or not text"),
}


@pytest.mark.parametrize(("payload", "message"), BAD_ROUTES.values(), ids=BAD_ROUTES)
def test_broken_routes_are_refused(payload: Any, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        read(answer(routed_experts=payload))


BAD_LOG_PROBS = {
    "one too few": ([[-0.5, 9, None], [-1.5, 8, None]], "got 2 log-probabilities for 3 sampled tokens"),
    "not a number": ([[-0.5, 9, None], [float("nan"), 8, None], [0.0, 258, None]], "finite"),
    "infinite": ([[-0.5, 9, None], [float("-inf"), 8, None], [0.0, 258, None]], "finite"),
    "above zero": ([[-0.5, 9, None], [0.5, 8, None], [0.0, 258, None]], "not above 0"),
    "of another token": ([[-0.5, 9, None], [-1.5, 7, None], [0.0, 258, None]], "other tokens"),
    "null": ([[-0.5, 9, None], [None, 8, None], [0.0, 258, None]], "not numbers"),
    "not entries": ([-0.5, -1.5, 0.0], "cannot be read"),
}


@pytest.mark.parametrize(("entries", "message"), BAD_LOG_PROBS.values(), ids=BAD_LOG_PROBS)
def test_broken_log_probs_are_refused(entries: Any, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        read(answer(output_token_logprobs=entries))


BAD_ANSWERS = {
    "stale weights": (answer(weight_version="3", weight_versions=None), "version 3, not 4"),
    "weights half written": (answer(weight_version="4-incomplete"), "4-incomplete"),
    "weights changed on the way": (
        answer(weight_versions=[{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]),
        "version 3",
    ),
    "aborted": (answer(finish_reason={"type": "abort", "message": "out of memory"}), "aborted.*out of memory"),
    "cut short": (answer(finish_reason={"type": "length", "length": 3}), "after 3 of 8 tokens"),
    "unknown finish": (answer(finish_reason={"type": "tool"}), "tool"),
    "unfinished": (answer(finish_reason=None), "cannot be read"),
    "stopped by a token that is not there": (
        {**answer(finish_reason={"type": "stop", "matched": 7})},
        "token 7 ended the response, but its last token is 258",
    ),
    "stopped by nothing": (answer(finish_reason={"type": "stop"}), "last token 258 is not an end token"),
    "logits of NaN": (
        answer(finish_reason={"type": "stop", "matched": "NaN happened"}),
        "'NaN happened', which is not",
    ),
    "stopped by what is neither": (
        answer(finish_reason={"type": "stop", "matched": 258.0}),
        "matched must be an integer, got 258.0",
    ),
    "a truncated prompt": (answer(prompt_tokens=2), "2 prompt tokens of 3"),
    "no tokens": ({**answer(output_token_logprobs=[]), "output_ids": []}, "shape"),
    "a token outside the vocabulary": ({**answer(), "output_ids": [9, 8, 260]}, "vocabulary of 260"),
    "a negative token": ({**answer(), "output_ids": [9, 8, -1]}, "vocabulary"),
    "not JSON": (b"<html>", "cannot be read"),
    "no log-probabilities": ({"output_ids": RESPONSE, "meta_info": {"finish_reason": {"type": "stop"}}}, "KeyError"),
}


@pytest.mark.parametrize(("value", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_broken_answers_are_refused(value: Any, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        read(value)


NO_NUMBERS = {
    "fractions": {"output_ids": [9.5, 8, 258]},
    "fractions that are whole": {"output_ids": [9.0, 8, 258]},
    "text": {"output_ids": ["9", 8, 258]},
    "truth": {"output_ids": [True, 8, 258]},
    "a text of numbers": {"output_ids": "987"},
}


@pytest.mark.parametrize("changes", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_whole_number_is_no_token(changes: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="must be a list of integers"):
        read(answer() | changes)


@pytest.mark.parametrize("name", ["prompt_tokens", "cached_tokens", "num_retractions"])
def test_a_count_that_is_no_whole_number_is_refused(name: str) -> None:
    for value in (3.0, "3", True):
        with pytest.raises(SampleError, match=f"{name} must be an integer, got"):
            read(answer(**({"cached_tokens": 3, "num_retractions": 0} | {name: value})))


@pytest.mark.parametrize("entry", [["-0.5", 9, None], [True, 9, None], [-0.5, 9.0, None], [-0.5, "9", None]])
def test_log_probabilities_that_are_no_numbers_are_refused(entry: list[Any]) -> None:
    with pytest.raises(RouteError, match="cannot be read"):
        read(answer(output_token_logprobs=[entry, [-1.5, 8, None], [0.0, 258, None]]))


def test_nesting_without_end_is_refused() -> None:
    body = json.dumps(answer()).encode()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(SampleError, match="nested too deeply"):
        read(body)


def test_routes_are_there_once_and_in_their_place() -> None:
    whole = answer()
    with pytest.raises(SampleError, match="there twice"):
        read({"routed_experts": "AAAA", **whole})
    elsewhere = {**answer(), "routed_experts": whole["meta_info"].pop("routed_experts")}
    elsewhere["meta_info"]["routed_experts"] = None
    with pytest.raises(SampleError, match="not in meta_info"):
        read(elsewhere)


def test_a_message_can_be_shown_whatever_the_server_said() -> None:
    for reason in ("\ud800\x1b[2J\n" * 1000, {"a": ["x" * 100_000]}):
        with pytest.raises(SampleError) as refused:
            read(answer(finish_reason={"type": "abort", "message": reason}))
        assert str(refused.value).isprintable() and len(str(refused.value)) < 4000
