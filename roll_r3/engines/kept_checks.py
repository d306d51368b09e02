"""Checks of the sets of kept tokens on arrival from an engine. Shape legend: R response tokens, J ids of all sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.config.findings.readable import readable
from roll_r3.errors import RouteError


def read_kept(rows: Any, response_ids_R: npt.NDArray[np.int32], vocab_size: int) -> KeptTokens:
    """Return the checked sets of an answer.

    Args:
        rows: one list of ids per response token, as parsed from JSON.

    Raises:
        RouteError: not lists of integers, or sets that break their contract (`check_kept`).
    """
    lists = isinstance(rows, list) and set(map(type, rows)) <= {list}
    if not lists or not set(map(type, chain.from_iterable(rows))) <= {int}:
        raise RouteError(f"kept tokens must be a list of lists of integers, got {readable(repr(rows))}")
    try:
        kept = KeptTokens.from_lists(rows)
    except OverflowError as error:
        raise RouteError(f"kept tokens cannot be read: {readable(error)}") from error
    check_kept(kept, response_ids_R, vocab_size)
    return kept


def check_kept(kept: KeptTokens, response_ids_R: npt.NDArray[np.int32] | Sequence[int], vocab_size: int) -> None:
    """Check for one set of distinct ids per response token, with the token inside.

    A set of another token then rarely passes. One that contains the token by chance shows as a difference between the
    log-probabilities of engine and trainer.

    Raises:
        RouteError: another number of sets, an id outside the vocabulary, an id twice, or a set without its token.
    """
    response_ids = np.asarray(response_ids_R, np.int32)
    if kept.num_rows != len(response_ids):
        raise RouteError(f"got {kept.num_rows} sets of kept tokens for {len(response_ids)} sampled tokens")
    ids_J, rows_J = kept.ids_J.astype(np.int64), kept.row_of_id
    if len(ids_J) and (ids_J.min() < 0 or ids_J.max() >= vocab_size):
        raise RouteError(
            f"kept tokens have ids in [{ids_J.min()}, {ids_J.max()}], but the vocabulary has {vocab_size} tokens"
        )
    in_set_R = np.zeros(len(response_ids), np.bool_)
    in_set_R[rows_J[ids_J == response_ids[rows_J]]] = True
    if not in_set_R.all():
        row = int(in_set_R.argmin())
        raise RouteError(
            f"sampled token {response_ids[row]} at place {row} of the response is not among its "
            f"{kept.counts_S[row]} kept tokens ({int((~in_set_R).sum())} such tokens)"
        )
    keys_J = rows_J * vocab_size + ids_J
    if len(np.unique(keys_J)) != len(keys_J):
        keys, counts = np.unique(keys_J, return_counts=True)
        row, token = divmod(int(keys[counts.argmax()]), vocab_size)
        raise RouteError(f"token {token} is twice among the kept tokens at place {row} of the response")
