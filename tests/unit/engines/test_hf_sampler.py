"""Choice of tokens and recording of routes, without a model of transformers."""

from __future__ import annotations

import pytest
import torch

from roll_r3.config.sampling_settings import Sampling
from roll_r3.engines.hf.routers import RouteRecorder
from roll_r3.engines.hf.sampler import Stop, _kept, choose, kept_tokens
from roll_r3.errors import RouteError

PROBS = (0.1, 0.4, 0.0, 0.3, 0.2)


def shares(*, top_p: float = 1.0, top_k: int = -1) -> list[float]:
    """Return the share of each token over evenly spread draws."""
    draws_B = torch.arange(10_000, dtype=torch.float64) / 10_000
    log_probs_BV = torch.tensor(PROBS).log().expand(len(draws_B), -1)
    kept_BV = kept_tokens(log_probs_BV, top_p=top_p, top_k=top_k)
    tokens_B = choose(log_probs_BV.masked_fill(~kept_BV, -torch.inf), draws_B)
    return (torch.bincount(tokens_B, minlength=len(PROBS)) / len(draws_B)).tolist()


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, -1, (0.1, 0.4, 0.0, 0.3, 0.2)),
        (1.0, 2, (0.0, 4 / 7, 0.0, 3 / 7, 0.0)),
        (1.0, 9, (0.1, 0.4, 0.0, 0.3, 0.2)),
        (0.75, -1, (0.0, 4 / 9, 0.0, 3 / 9, 2 / 9)),
        (0.01, -1, (0.0, 1.0, 0.0, 0.0, 0.0)),
        (0.75, 2, (0.0, 4 / 7, 0.0, 3 / 7, 0.0)),
    ],
)
def test_tokens_are_chosen_as_often_as_they_are_likely(top_p, top_k, kept):
    assert shares(top_p=top_p, top_k=top_k) == pytest.approx(kept, abs=2e-4)


def test_the_ends_of_the_unit_interval_choose_tokens_that_can_be():
    log_probs_BV = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(2, -1)
    draws_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(log_probs_BV, draws_B).tolist() == [1, 2]


def test_greedy_keeps_the_likeliest_token_whatever_else_is_set():
    log_probs_BV = torch.tensor([PROBS, PROBS[::-1]]).log()
    greedy = Sampling(4, temperature=2.0, top_p=0.9, top_k=3, greedy=True)
    assert _kept(log_probs_BV, greedy).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert _kept(log_probs_BV, Sampling(4)).all()
    assert _kept(log_probs_BV, Sampling(4, top_k=2)).sum(-1).tolist() == [2, 2]


def test_a_forward_is_recorded_once_by_every_router_in_their_order():
    first, last = (Recorded(), Recorded())
    recorder = RouteRecorder([first, last])
    last(torch.ones(3, 2))
    with pytest.raises(RouteError, match=r"ran \[0, 1\] times; each must run once"):
        recorder.take()
    first(torch.zeros(3, 2))
    assert recorder.take()[:, 0].tolist() == [[0, 0], [1, 1]]


STOP = Stop(frozenset({0}), ("</a>", "é"), lambda ids: bytes(ids).decode(errors="replace"))


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (b"abc\0", True),
        (b"\0abc", False),
        (b"x </a>", True),
        (b"x </a", False),
        ("caf\u00e9".encode(), True),
        ("caf\u00e9".encode()[:-1], False),
    ],
)
def test_an_end_token_or_a_whole_stop_string_ends_a_response(text, ends):
    assert STOP.ends(list(text)) is ends


class Recorded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x, x, x.long()
