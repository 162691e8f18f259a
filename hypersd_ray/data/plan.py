"""Which rows a rank reads, in which order. Pure: a function of (shards, seed, epoch, rank, world size), no Ray.

The dealing rule. An epoch permutes the shards. With at least as many shards as ranks, rank r takes shards r, r + world,
r + 2 world, ... of the permutation, whole. With fewer, every rank reads all shards and takes the rows
i = r modulo world of each (i counts a shard's kept rows). Either way each row is read once an epoch over all ranks and
no rank starves. A rank's shards are then grouped into windows; the rows of a window, as they are read, are
permuted in pools of `shuffle_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StreamPosition:
    """Where a rank's stream stands: `row` rows of its window number `window` in `epoch` have been handed out."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def to_dict(self) -> dict[str, int]:
        """For a checkpoint's JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamPosition:
        """The inverse of `to_dict`. Raises TypeError for an unknown field, ValueError for what is no number."""
        return cls(**{name: int(value) for name, value in values.items()})


@dataclass(frozen=True)
class Window:
    """Shards that a rank reads as one unit, and which of their rows: `part`, `part + parts`, ... of each shard."""

    index: int
    urls: tuple[str, ...]
    part: int = 0
    parts: int = 1


def shard_order(urls: Sequence[str], seed: int, epoch: int) -> list[str]:
    """The epoch's permutation of the shards, the same on every rank."""
    order = np.random.default_rng([seed, epoch]).permutation(len(urls))
    return [urls[i] for i in order]


def windows(
    urls: Sequence[str], seed: int, epoch: int, shards_per_window: int, rank: int = 0, world_size: int = 1
) -> list[Window]:
    """The windows of `rank` in `epoch`, by the rule above. Raises ValueError without shards or for a bad rank."""
    if not urls:
        raise ValueError("data.shards: no shards to read, at least 1 is needed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in 0..{world_size - 1}")
    mine = shard_order(urls, seed, epoch)
    part, parts = 0, 1
    if len(urls) >= world_size:
        mine = mine[rank::world_size]
    else:
        part, parts = rank, world_size
    starts = range(0, len(mine), shards_per_window)
    return [Window(i, tuple(mine[s : s + shards_per_window]), part, parts) for i, s in enumerate(starts)]


def row_order(rows: int, seed: int, epoch: int, window: int, pool: int) -> np.ndarray:
    """The permutation (rows,) int64 of pool number `pool` of a window."""
    return np.random.default_rng([seed, epoch, window, pool]).permutation(rows)
