"""A thousand random layouts against megatron's operations on whole tensors, with attention, in one process.

An input id is 100 * (sample + 1) + position, so a token in a wrong place is a wrong value.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from roll_r3.batch.token_map import PADDING, Layout, TokenMap, build_token_map, gather_slots

PAD = 0


@dataclass(frozen=True)
class Case:
    lens: list[int]
    packed: bool
    cp: int
    sp: int
    multiple: int
    pad_to: int

    @classmethod
    def draw(cls, seed: int) -> Case:
        rng = random.Random(seed)
        return cls(
            lens=[rng.randint(1, 20) for _ in range(rng.randint(1, 4))],
            packed=rng.random() < 0.5,
            cp=rng.choice([1, 2, 4]),
            sp=rng.choice([1, 2, 4]),
            multiple=rng.choice([1, 1, 2, 3]),
            pad_to=rng.choice([0, 0, 10, 50]),
        )

    @property
    def ids(self) -> list[torch.Tensor]:
        return [100 * (i + 1) + torch.arange(n) for i, n in enumerate(self.lens)]

    def up(self, length: int) -> int:
        align = self.sp * self.multiple * (2 * self.cp if self.cp > 1 else 1)
        while length % align:
            length += 1
        return length

    def layout(self, cp_rank: int, sp_rank: int) -> Layout:
        return Layout(self.packed, self.cp, cp_rank, self.sp, sp_rank, self.multiple)


def whole_tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return input_ids and position_ids padded or packed by a trainer, [B, S], and cu_seqlens if packed."""
    if not case.packed:
        width = case.up(max([*case.lens, case.pad_to]))
        input_ids = torch.full((len(case.lens), width), PAD)
        for row, ids in zip(input_ids, case.ids, strict=True):
            row[: len(ids)] = ids
        return input_ids, torch.arange(width).repeat(len(case.lens), 1), None
    parts = [torch.cat([ids, torch.full((case.up(len(ids)) - len(ids),), PAD)]) for ids in case.ids]
    spare = case.up(case.pad_to) - sum(map(len, parts))
    if spare > 0:
        parts.append(torch.full((spare,), PAD))
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    cu_seqlens = torch.tensor([0, *np.cumsum([len(part) for part in parts]).tolist()])
    return torch.cat(parts)[None], positions[None], cu_seqlens


def thd_indices(cu_seqlens: torch.Tensor, cp: int, cp_rank: int) -> torch.Tensor:
    """Return TransformerEngine's thd_get_partitioned_indices, token by token.

    The first half of a rank's tokens of a sequence lies in piece `rank`, the second in piece 2 * cp - 1 - rank.
    """
    if cp == 1:
        return torch.arange(int(cu_seqlens[-1]))
    found = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        held = (end - start) // cp
        half = held // 2
        for j in range(held):
            piece = cp_rank if j < half else 2 * cp - 1 - cp_rank
            found.append(start + piece * half + j % half)
    return torch.tensor(found)


def simulated(case: Case, cp_rank: int, parallel_state, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and position_ids of a context-parallel rank, [B, S]."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    input_ids, position_ids, cu_seqlens = whole_tensors(case)
    if cu_seqlens is not None:
        indices = thd_indices(cu_seqlens, case.cp, cp_rank)
        return input_ids[:, indices], position_ids[:, indices]
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: case.cp)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: cp_rank)
    batch = get_batch_on_this_cp_rank({"input_ids": input_ids, "position_ids": position_ids})
    return batch["input_ids"], batch["position_ids"]


def queries_keys_values(ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return numbers distinct for each token and position, [..., 2] each."""
    phase = torch.stack([torch.sin(ids * 0.7 + positions * 0.3), torch.cos(ids * 0.2 - positions * 0.9)], -1)
    return phase, phase.flip(-1) * 1.5, torch.stack([ids / 100, positions * 0.1 + ids % 7], -1)


def attend(query, key, value, allowed) -> torch.Tensor:
    scores = (query @ key.transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


def alone(case: Case) -> torch.Tensor:
    """Return causal attention of each sample by itself, without padding. [N, 2]"""
    outputs = []
    for ids in case.ids:
        positions = torch.arange(len(ids))
        allowed = positions[None, :] <= positions[:, None]
        outputs.append(attend(*queries_keys_values(ids.double(), positions.double()), allowed))
    return torch.cat(outputs)


def over_ranks(case: Case, maps: list[TokenMap]) -> np.ndarray:
    """Return the same from the ranks' parts: keys gathered, packed sequences separated by cu_seqlens. [N, 2]"""
    ids_N = torch.cat(case.ids).numpy()
    ids = [torch.from_numpy(m.gather(ids_N, PAD)) for m in maps]
    positions = [torch.from_numpy(m.positions_BS) for m in maps]
    sequences = []
    for token_map, local in zip(maps, ids, strict=True):
        if token_map.cu_seqlens is None:
            sequences.append(torch.zeros_like(local))
        else:  # a rank holds an equal share of every sequence
            ends = torch.from_numpy(token_map.cu_seqlens[1:] // case.cp).long()
            sequences.append(torch.searchsorted(ends, torch.arange(local.shape[1]), right=True)[None])
    _, keys, values = queries_keys_values(torch.cat(ids, 1).double(), torch.cat(positions, 1).double())
    all_positions, all_sequences = torch.cat(positions, 1), torch.cat(sequences, 1)
    total = np.zeros((len(ids_N), 2))
    for token_map, local, position, sequence in zip(maps, ids, positions, sequences, strict=True):
        query, _, _ = queries_keys_values(local.double(), position.double())
        allowed = all_positions[:, None, :] <= position[:, :, None]
        allowed &= all_sequences[:, None, :] == sequence[:, :, None]
        total += token_map.scatter(attend(query, keys, values, allowed).numpy())
    return total


def check(case: Case, parallel_state, monkeypatch) -> None:
    ids_N = torch.cat(case.ids).numpy()
    maps = []
    for cp_rank in range(case.cp):
        input_ids, position_ids = simulated(case, cp_rank, parallel_state, monkeypatch)
        for sp_rank in range(case.sp):
            token_map = build_token_map(case.lens, case.layout(cp_rank, sp_rank), pad_to=case.pad_to)
            np.testing.assert_array_equal(token_map.gather(ids_N, PAD), input_ids.numpy())
            np.testing.assert_array_equal(token_map.positions_BS, position_ids.numpy())
            # hidden states are [sequence, batch]; sequence parallelism cuts the first dimension, a router flattens both
            at_router = input_ids.transpose(0, 1).chunk(case.sp, dim=0)[sp_rank].reshape(-1)
            np.testing.assert_array_equal(gather_slots(ids_N, token_map.router_slots_t, PAD), at_router.numpy())
            assert len(at_router) % case.multiple == 0
            np.testing.assert_array_equal(token_map.slots_BS == PADDING, input_ids.numpy() == PAD)
        maps.append(token_map)
    _, _, cu_seqlens = whole_tensors(case)
    if cu_seqlens is not None:
        assert all(m.cu_seqlens is not None and m.cu_seqlens.tolist() == cu_seqlens.tolist() for m in maps)
    np.testing.assert_allclose(over_ranks(case, maps), alone(case).numpy(), rtol=1e-9, atol=1e-12)


def test_a_thousand_layouts_hold_what_megatron_would_give_their_ranks(monkeypatch):
    from megatron.core import parallel_state

    for seed in range(1000):
        case = Case.draw(seed)
        try:
            check(case, parallel_state, monkeypatch)
        except AssertionError as error:
            pytest.fail(f"{case}: {error}")
