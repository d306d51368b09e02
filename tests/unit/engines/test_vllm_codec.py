"""A good answer is read; each violation of its contract is refused with a reason."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import KEPT_LIMIT, Sampling
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.vllm.codec import VllmCodec, read_npy
from roll_r3.errors import RouteError
from roll_r3.models.facts import ModelFacts, facts_of

PROMPT = (5, 6, 7)
RESPONSE = [9, 8, 258]
ROWS, LAYERS, TOP_K, EXPERTS = 5, 3, 2, 16


def facts(num_experts: int = EXPERTS) -> ModelFacts:
    return facts_of(
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": LAYERS,
            "mlp_only_layers": [0],  # it comes as zeros and is left out
            "num_experts": num_experts,
            "num_experts_per_tok": TOP_K,
            "num_attention_heads": 4,
            "vocab_size": 260,
            "max_position_embeddings": 64,
            "decoder_sparse_step": 1,
        }
    )


FACTS = facts()


def routes(dtype: Any = np.uint8) -> np.ndarray:
    """Layer 0 zeros; layer l, row r: experts (r + l, r + l + 1) modulo 16; all rows and layers differ."""
    ids_RLK = np.zeros((ROWS, LAYERS, TOP_K), dtype)
    for row in range(ROWS):
        for layer in range(1, LAYERS):
            ids_RLK[row, layer] = [(row + layer) % EXPERTS, (row + layer + 1) % EXPERTS]
    return ids_RLK


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def encode(array: np.ndarray) -> str:
    return base64.b64encode(npy(array)).decode()


def answer(**choice: Any) -> dict[str, Any]:
    log_probs = zip((-0.5, -1.5, 0.0), RESPONSE, strict=True)
    return {
        "usage": {"prompt_tokens": len(PROMPT), "prompt_tokens_details": {"cached_tokens": 2}},
        "choices": [
            {
                "finish_reason": "stop",
                "token_ids": RESPONSE,
                "weight_versions": [{"version": "4", "start": 0, "end": 3}],
                "logprobs": {"content": [{"logprob": lp, "token_id": i, "rank": 1} for lp, i in log_probs]},
                "routed_experts": encode(routes()),
                **choice,
            }
        ],
    }


def read_whole(
    value: Any,
    model: ModelFacts = FACTS,
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
    codec = VllmCodec("", trust_remote_code=False)
    codec.end_tokens = END_TOKENS
    return codec.read(body, Asked(sample, 4), model)


END_TOKENS = frozenset({0, 258})
"""0 is the last token of the answers of one token."""


def read(value: Any, model: ModelFacts = FACTS, **changes: Any) -> Trajectory:
    return read_whole(value, model, **changes).trajectory


@pytest.mark.parametrize(
    ("num_experts", "dtype", "kept"),
    [(16, np.uint8, np.uint8), (512, np.uint16, np.uint16), (16, np.int32, np.uint8), (256, np.uint8, np.uint8)],
)
def test_a_good_answer_becomes_a_trajectory(num_experts, dtype, kept):
    trajectory = read(answer(routed_experts=encode(routes(dtype))), facts(num_experts))
    assert trajectory.response_ids.tolist() == RESPONSE
    assert trajectory.log_probs.tolist() == [-0.5, -1.5, 0.0]
    assert trajectory.finish_reason == "stop"
    assert trajectory.weight_versions == (4,)
    assert trajectory.routes.ids_MRK.dtype == kept
    np.testing.assert_array_equal(trajectory.routes.ids_MRK, routes()[:, 1:].transpose(1, 0, 2))


def test_without_recording_the_answer_needs_no_routes():
    assert read(answer(routed_experts=None), record_routes=False).routes is None


def test_kept_tokens_are_those_of_the_choice():
    sets = [[9, 4], [8], [7, 258, 3]]
    trajectory = read(answer(sampling_mask=sets), return_kept=True, top_k=5)
    assert trajectory.kept.counts_S.tolist() == [2, 1, 3] and trajectory.kept.ids_J.tolist() == [9, 4, 8, 7, 258, 3]
    assert read(answer(sampling_mask=sets)).kept is None
    with pytest.raises(RouteError, match="must be a list of lists of integers, got None"):
        read(answer(sampling_mask=None), return_kept=True, top_k=5)


@pytest.mark.parametrize(
    ("sampling", "sent"),
    [
        ({"top_k": 5, "top_p": 0.9, "temperature": 0.7}, (0.7, 0.9, 5)),
        ({}, (1.0, 1.0, KEPT_LIMIT)),
        ({"greedy": True}, (1.0, 1.0, 1)),
    ],
)
def test_a_server_that_returns_kept_tokens_gets_bounded_requests_only(sampling, sent):
    codec = VllmCodec("", trust_remote_code=False, returns_kept=True)
    asked = Asked(SampleRequest(PROMPT, "s", 0, Sampling(8, **sampling)), 4)
    params = codec.request(asked)["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == sent
    assert codec.kept_limit(asked) == sent[2], "sets come back, wanted or not"
    assert VllmCodec("", trust_remote_code=False).kept_limit(asked) == 0


def test_rows_from_the_first_wanted_on_are_read():
    trajectory = read(answer(routed_experts=encode(routes()[2:])), first_row=2)
    np.testing.assert_array_equal(trajectory.routes.ids_MRK[:, 2:], routes()[2:, 1:].transpose(1, 0, 2))
    assert trajectory.routes.known_R.tolist() == [False, False, True, True, True]
    with pytest.raises(RouteError, match=r"5, 3, 2.*3 rows"):
        read(answer(), first_row=2)


@pytest.mark.parametrize(
    ("details", "expected"), [({"cached_tokens": 2}, True), ({"cached_tokens": 1}, False), (None, False)]
)
def test_what_came_from_the_cache(details, expected):
    usage = {"prompt_tokens": len(PROMPT), "prompt_tokens_details": details}
    assert read_whole({**answer(), "usage": usage}, cached_rows=2).from_cache == expected


def changed(row: int, layer: int, ids: list[int], dtype: Any = np.uint8) -> str:
    ids_RLK = routes(dtype)
    ids_RLK[row, layer] = ids
    return encode(ids_RLK)


def lost_layer() -> str:
    ids_RLK = routes()
    ids_RLK[:, 2] = 0
    return encode(ids_RLK)


def raw(header: str, data: bytes = b"") -> str:
    text = header.encode()
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data).decode()


GOOD = "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 3, 2), }\n"
BAD_ROUTES = {
    "a row too few": (encode(routes()[:-1]), "4, 3, 2.*5 rows"),
    "a row too many": (encode(np.concatenate([routes(), routes()[-1:]])), "6, 3, 2.*5 rows"),
    "a layer too few": (encode(routes()[:, :-1]), "5, 2, 2.*3 layers"),
    "an axis too few": (encode(routes()[0]), "not an array of expert ids"),
    "an id above the range": (changed(1, 2, [3, EXPERTS]), "16 experts"),
    "a negative id": (changed(1, 2, [3, -1], np.int32), "-1"),
    "an expert twice": (changed(1, 2, [3, 3]), "twice"),
    "an MoE layer of zeros": (lost_layer(), r"all zeros in MoE layers \[2\]"),
    "fractions": (encode(routes().astype(np.float32)), "not an array of expert ids"),
    "the other order of bytes": (encode(routes().astype(">u2")), "not an array of expert ids"),
    "the other order of axes": (encode(np.asfortranarray(routes())), "not an array of expert ids"),
    "objects": (encode(np.array([[[{}, {}]] * 3] * 5, object)), "not an array of expert ids"),
    "more rows than there are bytes": (raw(GOOD.replace("5", "999999999"), b"\0" * 30), r"\[999999999, 3, 2\]"),
    "too short": (raw(GOOD, b"\0" * 29), "29 bytes follow"),
    "too long": (raw(GOOD, b"\0" * 31), "31 bytes follow"),
    "far too long": (base64.b64encode(b"\0" * 9000).decode(), "12000 characters, too many"),
    "a header that computes": (raw("{'descr': '|u1', 'shape': (__import__('os'),)}\n"), "not an array of expert ids"),
    "half a header": (base64.b64encode(npy(routes())[:40]).decode(), "not an array of expert ids"),
    "nothing": ("", "not an array of expert ids"),
    "not base64": ("?" * 160, "base64"),
    "not ASCII": ("é" * 160, "base64"),
    "missing": (None, "missing or not text"),
}


@pytest.mark.parametrize(("payload", "message"), BAD_ROUTES.values(), ids=BAD_ROUTES)
def test_broken_routes_are_refused(payload, message):
    with pytest.raises(RouteError, match=message):
        read(answer(routed_experts=payload))


@settings(max_examples=2000)
@given(data=st.data())
def test_a_file_that_is_damaged_anywhere_is_the_array_or_refused(data):
    """Cut, insert and change bytes: never another error, never another shape."""
    content = bytearray(npy(data.draw(st.sampled_from([routes(), routes(np.uint16), routes(np.int32)]))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 8)))
        content[start:end] = data.draw(st.binary(max_size=8))
    try:
        ids_RLK = read_npy(memoryview(base64.b64encode(content)), ROWS, FACTS)
    except RouteError:
        return
    assert ids_RLK.shape == (ROWS, LAYERS, TOP_K)
    assert ids_RLK.dtype in (np.uint8, np.uint16, np.int32)


@settings(max_examples=500)
@given(text=st.binary())
def test_any_payload_is_read_or_refused(text):
    with pytest.raises(RouteError):
        read_npy(memoryview(text), ROWS, FACTS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=1500)
@given(field=st.sampled_from(sorted(answer()["choices"][0])), value=VALUES)
def test_any_field_of_any_form_is_read_or_refused(field, value):
    try:
        trajectory = read(answer(**{field: value}))
    except (SampleError, RouteError):
        return
    assert trajectory.response_ids.tolist() == RESPONSE


BAD_LOG_PROBS = {
    "one too few": ([(-0.5, 9), (-1.5, 8)], "got 2 log-probabilities for 3 sampled tokens"),
    "infinite": ([(-0.5, 9), (float("-inf"), 8), (0.0, 258)], "finite"),
    "above zero": ([(-0.5, 9), (0.5, 8), (0.0, 258)], "not above 0"),
    "of another token": ([(-0.5, 9), (-1.5, 7), (0.0, 258)], "other tokens"),
    "null": ([(-0.5, 9), (None, 8), (0.0, 258)], "not numbers"),
}


@pytest.mark.parametrize(("entries", "message"), BAD_LOG_PROBS.values(), ids=BAD_LOG_PROBS)
def test_broken_log_probs_are_refused(entries, message):
    with pytest.raises(RouteError, match=message):
        read(answer(logprobs={"content": [{"logprob": lp, "token_id": i} for lp, i in entries]}))


def spans(*versions: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in versions]


def without_its_end() -> dict[str, Any]:
    """Return an answer from a proxy that strips the end token."""
    whole = answer()["choices"][0]
    return {
        "token_ids": whole["token_ids"][:-1],
        "weight_versions": spans(("4", 0, 2)),
        "logprobs": {"content": whole["logprobs"]["content"][:-1]},
        "routed_experts": encode(routes()[:-1]),
    }


BAD_ANSWERS = {
    "stale weights": (answer(weight_versions=spans(("3", 0, 3))), "version 3, not 4"),
    "weights half written": (answer(weight_versions=spans(("4-incomplete", 0, 3))), "4-incomplete"),
    "weights changed on the way": (answer(weight_versions=spans(("3", 0, 1), ("4", 1, 3))), "version 3"),
    "tokens of unknown weights": (answer(weight_versions=spans(("4", 0, 2))), "do not cover"),
    "a hole in the weights": (answer(weight_versions=spans(("4", 0, 1), ("4", 2, 3))), "do not cover"),
    "no version at all": (answer(weight_versions=None), "cannot be read"),
    "aborted": (answer(finish_reason="abort"), "aborted"),
    "an error": (answer(finish_reason="error"), "error"),
    "unfinished": (answer(finish_reason=None), "None"),
    "cut short": (answer(finish_reason="length"), "after 3 of 8 tokens"),
    "a truncated prompt": ({**answer(), "usage": {"prompt_tokens": 2}}, "2 prompt tokens of 3"),
    "a token outside the vocabulary": (answer(token_ids=[9, 8, 260]), "vocabulary of 260"),
    "stopped without an end token": (answer(**without_its_end()), "last token 8 is not an end token"),
    "two choices": ({**answer(), "choices": answer()["choices"] * 2}, "cannot be read"),
    "not JSON": (b"<html>", "cannot be read"),
    "no log-probabilities": (answer(logprobs=None), "cannot be read"),
}


@pytest.mark.parametrize(("value", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_broken_answers_are_refused(value, message):
    with pytest.raises(SampleError, match=message):
        read(value)


def test_more_tokens_than_were_asked_for_are_refused():
    with pytest.raises(SampleError, match="3 tokens, more than the requested 2"):
        read(answer(), max_new_tokens=2)


@pytest.mark.parametrize("ids", [[9.0, 8, 258], ["9", 8, 258], [True, 8, 258]])
def test_what_is_no_whole_number_is_no_token(ids):
    with pytest.raises(SampleError, match="must be a list of integers"):
        read(answer(token_ids=ids))


def test_spans_that_overlap_do_not_cover_the_response():
    spans = [{"version": "4", "start": 0, "end": 3}, {"version": "4", "start": 3, "end": 1}]
    with pytest.raises(SampleError, match="do not cover"):
        read(answer(weight_versions=[*spans, {"version": "4", "start": 1, "end": 3}]))


def test_routes_are_in_their_place():
    value = answer(routed_experts=None)
    value["usage"]["routed_experts"] = encode(routes())
    with pytest.raises(SampleError, match="not in the choice"):
        read(value)
