"""Counts of what a replay session did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplayCounts:
    """What a replay session did, in (token, MoE layer) entries, summed over all ranks of the world."""

    trainable: int = 0
    """Entries of tokens whose label is trained on."""
    trainable_replayed: int = 0
    """Those of them that used a recorded row."""
    missing: int = 0
    """Entries of real tokens whose row the engine never saw: the live router decided."""
    padded: int = 0
    """Entries of padding slots."""
    compared: int = 0
    """Replayed entries of real tokens that were compared with the live router's own choice."""
    agreed: int = 0
    """Those of them where the live router would have chosen the same set of experts."""
    audited: int = 0
    """Entries whose dispatch was compared with their recorded row; a recomputation in backward compares them again."""
    audit_equal: int = 0
    """Those of them whose token went to exactly the recorded experts."""
