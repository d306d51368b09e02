"""Counts of a replay session."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplayCounts:
    """Counts of a replay session in (token, MoE layer) entries, summed over all ranks of the world."""

    trainable: int = 0
    """Entries of tokens with a trained label."""
    trainable_replayed: int = 0
    """Trainable entries routed by a recorded row."""
    missing: int = 0
    """Entries of real tokens without a recorded row: the live router decided."""
    padded: int = 0
    """Entries of padding slots."""
    compared: int = 0
    """Replayed entries of real tokens compared with the live router's own choice."""
    agreed: int = 0
    """Compared entries with the same set of experts in the live router's choice."""
    audited: int = 0
    """Entries with a dispatch compared with the recorded row; a recomputation in backward compares them again."""
    audit_equal: int = 0
    """Audited entries dispatched to exactly the recorded experts."""
