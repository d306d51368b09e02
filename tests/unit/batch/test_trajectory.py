"""Streams of one turn and of several: what they hold, what they refuse, and their training form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from roll_r3.batch.batch import Batch
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import NOT_SAMPLED, Trajectory, Turn


def two_turns(known: bool = True) -> Trajectory:
    """Two prompt tokens, two sampled ones, three of a tool, one sampled one by newer weights."""
    sampled_T = np.array([0, 0, 1, 1, 0, 0, 0, 1], np.bool_)
    known_R = np.array([1, 1, 1, 1, 0, 0, 1], np.bool_)
    return Trajectory(
        "s",
        "g",
        token_ids_T=np.arange(10, 18, dtype=np.int32),
        sampled_T=sampled_T,
        log_probs_T=np.array([0, 0, -1, -2, 0, 0, 0, -3], np.float32),
        versions_T=np.where(sampled_T, [0, 0, 4, 4, 0, 0, 0, 5], NOT_SAMPLED).astype(np.int32),
        turns=(Turn(2, 4, "stop"), Turn(7, 8, "length")),
        routes=RoutedExperts(np.zeros((2, 7, 2), np.uint8), None if known else known_R),
    )


def one_turn(**changed: Any) -> Trajectory:
    fields = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "log_probs": [-0.5, -1.0, -1.5], "version": 3}
    return Trajectory.one_turn("s", "g", **(fields | {"finish_reason": "stop"} | changed))


def test_one_turn_is_a_stream() -> None:
    t = one_turn()
    assert t.token_ids_T.tolist() == [5, 6, 7, 8, 9] and t.token_ids_T.dtype == np.int32
    assert t.sampled_T.tolist() == [False, False, True, True, True]
    assert t.log_probs_T.tolist() == [0, 0, -0.5, -1.0, -1.5] and t.log_probs_T.dtype == np.float32
    assert t.versions_T.tolist() == [-1, -1, 3, 3, 3] and t.versions_T.dtype == np.int32
    assert t.turns == (Turn(2, 5, "stop"),)
    assert (t.num_tokens, t.num_sampled, t.weight_versions, t.finish_reason) == (5, 3, (3,), "stop")
    assert (t.prompt_ids.tolist(), t.response_ids.tolist()) == ([5, 6], [7, 8, 9])
    assert t.log_probs.tolist() == [-0.5, -1.0, -1.5]


def test_tool_output_is_part_of_the_response_and_not_sampled() -> None:
    t = two_turns()
    assert (t.prompt_ids.tolist(), t.response_ids.tolist()) == ([10, 11], [12, 13, 14, 15, 16, 17])
    assert (t.num_tokens, t.num_sampled) == (8, 3)
    assert t.log_probs.tolist() == [-1, -2, -3]
    assert (t.weight_versions, t.finish_reason) == ((4, 5), "length")


def test_a_batch_trains_on_sampled_tokens_alone() -> None:
    """Labels are the next tokens, so the mask, log-probabilities and versions are the stream's without its first."""
    batch = Batch.from_trajectories([two_turns(known=False), replace(one_turn(), routes=routes(4))])
    assert batch.lengths_n.tolist() == [7, 4]
    assert batch.input_ids_N.tolist() == [10, 11, 12, 13, 14, 15, 16, 5, 6, 7, 8]
    assert batch.labels_N.tolist() == [11, 12, 13, 14, 15, 16, 17, 6, 7, 8, 9]
    assert batch.loss_mask_N.tolist() == [bool(x) for x in (0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1)]
    assert batch.rollout_log_probs_N.tolist() == [0, -1, -2, 0, 0, 0, -3, 0, -0.5, -1.0, -1.5]
    assert batch.versions_N is not None
    assert batch.versions_N.tolist() == [-1, 4, 4, -1, -1, -1, 5, -1, 3, 3, 3]
    assert batch.routes is not None and isinstance(batch.routes[0], RoutedExperts)
    assert batch.routes[0].known_R is not None
    assert batch.routes[0].known_R.tolist() == [True] * 4 + [False] * 2 + [True]


def test_dtypes_of_a_batch() -> None:
    batch = Batch.from_trajectories([one_turn(), two_turns(), two_turns()][:1])
    assert {str(x.dtype) for x in (batch.input_ids_N, batch.labels_N, batch.lengths_n)} == {"int64"}
    assert (batch.loss_mask_N.dtype, batch.rollout_log_probs_N.dtype) == (np.bool_, np.float32)
    assert batch.versions_N is not None and batch.versions_N.dtype == np.int32


def test_versions_follow_their_samples() -> None:
    batch = Batch.from_trajectories([replace(two_turns(), routes=None), one_turn()])
    picked = batch.select([1])
    assert picked.versions_N is not None and picked.versions_N.tolist() == [-1, 3, 3, 3]
    grown = batch.filled_up(4)
    assert grown.versions_N is not None and len(grown.versions_N) == len(grown.labels_N)


def routes(rows: int) -> RoutedExperts:
    return RoutedExperts(np.zeros((2, rows, 2), np.uint8))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "token ids of 8 bytes": (
        {"token_ids_T": np.arange(8)},
        r"s: token_ids_T must be int32 \[8\], got int64 \[8\]",
    ),
    "too few log-probabilities": (
        {"log_probs_T": np.zeros(7, np.float32)},
        r"log_probs_T must be float32 \[8\], got float32 \[7\]",
    ),
    "no turn": ({"turns": ()}, "the sampled tokens must be those of the turns"),
    "a turn too many": (
        {"turns": (Turn(2, 4, "stop"), Turn(5, 6, "stop"), Turn(7, 8, "stop"))},
        "the sampled tokens must be those of the turns",
    ),
    "a turn behind the end": ({"turns": (Turn(2, 4, "stop"), Turn(7, 9, "stop"))}, "ordered parts of tokens 1 to 8"),
    "turns out of order": ({"turns": (Turn(7, 8, "stop"), Turn(2, 4, "stop"))}, "ordered parts of tokens 1 to 8"),
    "an empty turn": ({"turns": (Turn(2, 4, "stop"), Turn(5, 5, "stop"))}, "ordered parts of tokens 1 to 8"),
    "a log-probability of a prompt": (
        {"log_probs_T": np.full(8, -1, np.float32)},
        "not sampled has a log-probability or a version",
    ),
    "a version of a prompt": (
        {"versions_T": np.full(8, 4, np.int32)},
        "not sampled has a log-probability or a version",
    ),
    "a sampled token of no version": (
        {"versions_T": np.full(8, -1, np.int32)},
        "a sampled token has no weight version",
    ),
    "routes of a row too many": ({"routes": routes(8)}, "routes must have 7 rows, one per input, got 8"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_one_stream_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(two_turns(), **changed)


def test_the_first_token_cannot_be_sampled() -> None:
    """No input has it as its label."""
    with pytest.raises(ValueError, match="ordered parts of tokens 1 to 3"):
        one_turn(prompt_ids=[])


def test_unknown_rows_go_before_known_ones() -> None:
    own = RoutedExperts(np.full((2, 3, 2), 9, np.uint8))
    assert own.after_unknown(0) is own
    moved = own.after_unknown(2)
    assert moved.ids_MRK.shape == (2, 5, 2) and moved.dtype == np.uint8
    assert (moved.ids_MRK[:, 2:] == 9).all()
    assert moved.known_R is not None and moved.known_R.tolist() == [False, False, True, True, True]
    again = moved.after_unknown(1)
    assert again.known_R is not None and again.known_R.tolist() == [False, False, False, True, True, True]
