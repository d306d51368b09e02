"""Hostile bodies in the place of a server's answers, to samples and to other questions.

Accepted answers are checked again with the standard library alone.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from fuzz_harness import Verdict, Wrong, mutated, replanted
from hypothesis import strategies as st

from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.sample import Asked, Sample, SampleError, SampleRequest
from roll_r3.engines.sglang import codec as sglang
from roll_r3.engines.vllm import codec as vllm
from roll_r3.errors import RouteError
from roll_r3.models.facts import facts_of

PROMPT, RESPONSE, LOG_PROBS = (5, 6, 7), [9, 8, 258], [-0.5, -1.5, 0.0]
END = 258
ROWS, LAYERS, TOP_K, EXPERTS, VOCAB, VERSION, MOST = 5, 3, 2, 16, 260, 4, 8
FACTS = facts_of(
    {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "mlp_only_layers": [0], "decoder_sparse_step": 1,
     "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_attention_heads": 4, "vocab_size": VOCAB,
     "max_position_embeddings": 64}
)  # fmt: skip
MESSAGE = 4000
"""Characters of the longest message."""


def _routes() -> np.ndarray:
    ids_RLK = np.zeros((ROWS, LAYERS, TOP_K), np.int32)
    for row in range(ROWS):
        for layer in range(1, LAYERS):
            ids_RLK[row, layer] = [(row + layer) % EXPERTS, (row + layer + 1) % EXPERTS]
    return ids_RLK


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


SGLANG = {
    "text": 'it says "routed_experts": "x"',
    "output_ids": RESPONSE,
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 258},
        "prompt_tokens": len(PROMPT),
        "cached_tokens": 2,
        "num_retractions": 0,
        "weight_version": "4",
        "weight_versions": [{"version": "4", "start": 0, "end": 3}],
        "output_token_logprobs": [[p, i, None] for p, i in zip(LOG_PROBS, RESPONSE, strict=True)],
        "routed_experts": _text(_routes().astype("<i4").tobytes()),
    },
}
VLLM = {
    "usage": {"prompt_tokens": len(PROMPT), "prompt_tokens_details": {"cached_tokens": 2}},
    "choices": [
        {
            "finish_reason": "stop",
            "token_ids": RESPONSE,
            "weight_versions": [{"version": "4", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
            "logprobs": {"content": [{"logprob": p, "token_id": i} for p, i in zip(LOG_PROBS, RESPONSE, strict=True)]},
            "routed_experts": _text(_npy(_routes().astype(np.uint8))),
        }
    ],
}


class NotRight(Exception):
    """Error of an answer that breaks the contract."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise NotRight(what)


def _common(ids: Any, entries: list[tuple[Any, Any]], reason: Any, end: Any, versions: list[Any], prompt: Any) -> None:
    need(isinstance(ids, list) and 1 <= len(ids) <= MOST, "tokens")
    need(all(type(i) is int and 0 <= i < VOCAB for i in ids), "a token")
    need(len(entries) == len(ids), "as many log-probabilities as tokens")
    for (value, token), i in zip(entries, ids, strict=True):
        need(type(value) in (int, float) and math.isfinite(value) and value <= 1e-4, "a log-probability")
        need(type(token) is int and token == i, "its token")
    need(reason != "stop" or end == ids[-1], "the token that ended it")
    need(reason in ("stop", "length") and (reason == "stop" or len(ids) == MOST), "the end")
    need(versions and all(str(v) == str(VERSION) for v in versions), "versions")
    need(type(prompt) is int and prompt == len(PROMPT), "the prompt")


def _ids(flat: list[int], count: int) -> list[list[list[int]]]:
    """Return checked ids as [rows][layers][k]."""
    rows = len(PROMPT) + count - 1
    need(len(flat) == rows * LAYERS * TOP_K, "as many ids as there are to be")
    shaped = [[flat[(r * LAYERS + m) * TOP_K :][:TOP_K] for m in range(LAYERS)] for r in range(rows)]
    routed = [ids for row in shaped for ids in row[1:]]  # a dense layer's ids are never used
    need(all(0 <= i < EXPERTS for ids in routed for i in ids), "an expert")
    need(all(len(set(ids)) == TOP_K for ids in routed), "an expert twice")
    return shaped


def sglang_says(body: bytes) -> tuple[list[int], list[float], list[list[list[int]]]]:
    said = json.loads(body)
    meta = said["meta_info"]
    entries = [(entry[0], entry[1]) for entry in meta["output_token_logprobs"]]
    versions = [meta["weight_version"], *(span["version"] for span in meta.get("weight_versions") or ())]
    reason = meta["finish_reason"]
    end = reason.get("matched")
    need(end is None or type(end) in (int, str), "an end")
    _common(said["output_ids"], entries, reason["type"], end, versions, meta["prompt_tokens"])
    data = base64.b64decode(meta["routed_experts"], validate=True)
    need(len(data) % 4 == 0, "whole ids")
    flat = list(struct.unpack(f"<{len(data) // 4}i", data))
    return said["output_ids"], [value for value, _ in entries], _ids(flat, len(said["output_ids"]))


def vllm_says(body: bytes) -> tuple[list[int], list[float], list[list[list[int]]]]:
    said = json.loads(body)
    need(len(said["choices"]) == 1, "one choice")
    choice = said["choices"][0]
    entries = [(entry["logprob"], entry["token_id"]) for entry in choice["logprobs"]["content"]]
    spans = choice["weight_versions"]
    covered = [t for span in spans for t in range(span["start"], span["end"])]
    need(covered == list(range(len(choice["token_ids"]))), "every token has a version")
    versions = [span["version"] for span in spans]
    prompt = said["usage"]["prompt_tokens"]
    _common(choice["token_ids"], entries, choice["finish_reason"], END, versions, prompt)
    data = base64.b64decode(choice["routed_experts"], validate=True)
    need(data[:8] == b"\x93NUMPY\x01\0", "npy")
    end = 10 + struct.unpack_from("<H", data, 8)[0]
    head = ast.literal_eval(data[10:end].decode().strip())
    need(head["fortran_order"] is False and head["shape"][1:] == (LAYERS, TOP_K), "its shape")
    kind = {"|u1": "B", "<u2": "H", "<i4": "i"}[head["descr"]]
    flat = list(struct.unpack(f"<{(len(data) - end) // struct.calcsize(kind)}{kind}", data[end:]))
    return choice["token_ids"], [value for value, _ in entries], _ids(flat, len(choice["token_ids"]))


@dataclass(frozen=True)
class Engine:
    good: dict[str, Any]
    read: Callable[..., Sample]
    says: Callable[[bytes], tuple[list[int], list[float], list[list[list[int]]]]]
    holder: tuple[Any, ...]
    """Path to the routes in the answer."""


_VLLM = vllm.VllmCodec("", trust_remote_code=False)
_VLLM.end_tokens = frozenset({END})
ENGINES = {
    "sglang": Engine(SGLANG, sglang.SglangCodec().read, sglang_says, ("meta_info",)),
    "vllm": Engine(VLLM, _VLLM.read, vllm_says, ("choices", 0)),
}
METRICS = b"""# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",enable_prefix_caching="True",engine="0"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 2.0
"""


def _page_of_sglang(body: bytes) -> int:
    said = json.loads(body)
    need(type(said["disable_radix_cache"]) is bool, "whether there is a cache")
    need(said["disable_radix_cache"] or (type(said["page_size"]) is int and said["page_size"] > 0), "a page")
    return 0 if said["disable_radix_cache"] else said["page_size"]


def _version_of_vllm(body: bytes) -> str:
    version = json.loads(body)["weight_version"]
    need(type(version) is str, "a version")
    return version


def _preemptions_of_vllm(body: bytes) -> int:
    lines = [line for line in body.split(b"\n") if line.startswith(b"vllm:num_preemptions_total")]
    values = [float(line.rsplit(b" ", 1)[1]) for line in lines if line[26:27] in (b"{", b" ") and line.count(b" ")]
    need(values and all(value >= 0 and value == int(value) for value in values), "counts")
    return int(sum(values))


def _page_of_vllm(body: bytes) -> int:
    (line,) = [line for line in body.split(b"\n") if line.startswith(b"vllm:cache_config_info{")][:1]
    cached = line.split(b'enable_prefix_caching="')[-1].split(b'"')[0]
    return int(line.split(b'block_size="')[-1].split(b'"')[0]) if cached == b"True" else 0


SIDES: dict[str, tuple[bytes, Callable[[bytes], Any], Callable[[bytes], Any]]] = {
    "sglang's cache": (
        b'{"page_size": 64, "disable_radix_cache": false, "x": 1}',
        sglang.read_cache_page,
        _page_of_sglang,
    ),
    "vllm's version": (b'{"weight_version": "4", "x": 1}', vllm.read_weight_version, _version_of_vllm),
    "vllm's preemptions": (METRICS, vllm.read_preemptions, _preemptions_of_vllm),
    "vllm's cache": (METRICS, vllm.read_cache_page, _page_of_vllm),
}
"""Question besides samples -> a good answer, its reader, and the expected value."""
LITERALS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"0x1", b"01", b"1_0", b'"1"', b"true",
    b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"1.0", b"1e0", b"-0", b"5e-324",
]  # fmt: skip


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from([*sorted(ENGINES), *sorted(ENGINES), *sorted(SIDES)]))
    if name in SIDES:
        return name, draw(_side_bodies(SIDES[name][0]))
    good = ENGINES[name].good
    kind = draw(st.sampled_from(["good", "replanted", "replanted", "replanted", "bytes", "literal", "routes", "deep"]))
    value: Any = good
    if kind == "replanted":
        value = draw(replanted(good))
    elif kind == "routes":
        value = _with_routes(good, ENGINES[name].holder, draw(mutated(_routes_of(good, ENGINES[name].holder))))
    body = json.dumps(value, default=lambda _: None).encode()
    if kind == "bytes":
        body = draw(mutated(body))
    elif kind == "literal":
        body = draw(_with_literal(body))
    elif kind == "deep":
        body = draw(_deep(body))
    elif draw(st.integers(0, 20)) == 0:
        body = body.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))
    return name, body


@st.composite
def _with_literal(draw: st.DrawFn, body: bytes) -> bytes:
    numbers = [i for i in range(len(body)) if body[i : i + 1].isdigit() and not body[i - 1 : i].isalnum()]
    at = draw(st.sampled_from(numbers))
    return body[:at] + draw(st.sampled_from(LITERALS)) + body[at + 1 :]


@st.composite
def _deep(draw: st.DrawFn, body: bytes) -> bytes:
    depth = draw(st.sampled_from([50, 900, 1100, 100_000]))
    return body[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"


@st.composite
def _side_bodies(draw: st.DrawFn, good: bytes) -> bytes:
    kinds = ["good", "bytes", "bytes", "literal", "literal", *["replanted", "deep"] * good.startswith(b"{")]
    kind = draw(st.sampled_from(kinds))
    if kind == "replanted":
        return json.dumps(draw(replanted(json.loads(good))), default=lambda _: None).encode()
    if kind == "bytes":
        return draw(mutated(good))
    return good if kind == "good" else draw(_with_literal(good) if kind == "literal" else _deep(good))


def _routes_of(good: dict[str, Any], holder: tuple[Any, ...]) -> bytes:
    node: Any = good
    for key in holder:
        node = node[key]
    return base64.b64decode(node["routed_experts"])


def _with_routes(good: dict[str, Any], holder: tuple[Any, ...], data: bytes) -> Any:
    changed = json.loads(json.dumps(good))
    node = changed
    for key in holder:
        node = node[key]
    node["routed_experts"] = _text(data)
    return changed


class Answers:
    name = "answers"

    def inputs(self) -> st.SearchStrategy[Any]:
        return _bodies()

    def judge(self, value: tuple[str, bytes]) -> Verdict:
        name, body = value
        if name in SIDES:
            return self._judge_side(body, *SIDES[name])
        asked = Asked(SampleRequest(PROMPT, "s", 0, Sampling(MOST)), VERSION)
        try:
            found = ENGINES[name].read(body, asked, FACTS).trajectory
        except (SampleError, RouteError) as error:
            _check_refusal(error, right=body == json.dumps(ENGINES[name].good).encode())
            return "refused"
        try:
            says = ENGINES[name].says(body)
        except Exception as error:
            raise Wrong(f"taken, though {type(error).__name__}: {error}") from error
        _compare(found, says)
        return "taken"

    def _judge_side(
        self, body: bytes, good: bytes, read: Callable[[bytes], Any], says: Callable[[bytes], Any]
    ) -> Verdict:
        try:
            found = read(body)
        except SampleError as error:
            _check_refusal(error, right=body == good)
            return "refused"
        try:
            right = says(body)
        except Exception as error:
            raise Wrong(f"taken as {found!r}, though {type(error).__name__}: {error}") from error
        if found != right or type(found) is not type(right):
            raise Wrong(f"read as {found!r}, and says {right!r}")
        return "taken"

    def close(self) -> None: ...


def _check_refusal(error: Exception, *, right: bool) -> None:
    text = str(error)
    if not text or len(text) > MESSAGE or not text.isprintable():
        raise Wrong(f"a message that cannot be shown: {len(text)} characters: {text[:200]!r}") from error
    if right:
        raise Wrong(f"refused, and is right: {text}") from error


def _compare(found: Trajectory, says: tuple[list[int], list[float], list[list[list[int]]]]) -> None:
    ids, log_probs, routes = says
    if found.response_ids.tolist() != ids:
        raise Wrong("other tokens than it says")
    if not np.array_equal(found.log_probs, np.minimum(np.array(log_probs, np.float32), np.float32(0))):
        raise Wrong("other log-probabilities than it says")
    assert found.routes is not None
    if found.routes.ids_MRK.transpose(1, 0, 2).tolist() != [row[1:] for row in routes]:
        raise Wrong("other routes than it says")
