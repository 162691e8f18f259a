"""Stateless randomness: every draw is a function of the run's seed and where in the run it is made."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and their order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `parts`: the same draws on every device."""
    return torch.Generator().manual_seed(seed_of(*parts))
