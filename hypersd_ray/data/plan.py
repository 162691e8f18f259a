"""Which rows a rank reads, in which order. Pure: a function of (shards, seed, epoch, rank, world size), no Ray.

The dealing rule. An epoch permutes the shards. With at least as many shards as ranks, rank r takes shards r, r + world,
r + 2 world, ... of the permutation, whole. With fewer, every rank reads all shards and takes the rows
i = r modulo world of each (i counts a shard's kept rows). Either way each row is read once an epoch over all ranks and
no rank starves. A rank's shards are then grouped into windows; the rows of a window, as they are read, are
permuted in pools of `shuffle_rows`.

When the number of ranks changes, what the former ranks had left of their epochs is dealt to the new ones window by window
(`deal_again`); after it they begin the next epoch by the rule. So each row is still read once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Slot:
    """Window number `window` of what `epoch` dealt to `rank` of `world_size`, from its row `row` on."""

    epoch: int
    window: int
    row: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class StreamPosition:
    """Where a rank's stream stands: `row` rows of its window number `window` in `epoch` have been handed out. First comes
    what is `left` of earlier epochs since the number of ranks changed."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    left: tuple[Slot, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint's JSON."""
        own = {"epoch": self.epoch, "window": self.window, "row": self.row}
        return own | {"left": [list(astuple(slot)) for slot in self.left]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamPosition:
        """The inverse of `to_dict`. Raises TypeError for an unknown field, ValueError for what is no number."""
        own = dict(values)
        left = tuple(Slot(*map(int, slot)) for slot in own.pop("left", ()))
        return cls(**{name: int(value) for name, value in own.items()}, left=left)


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


def slots_of(
    position: StreamPosition,
    last_epoch: int,
    urls: Sequence[str],
    seed: int,
    shards_per_window: int,
    rank: int,
    world_size: int,
) -> list[Slot]:
    """What `rank` has still to read at `position` up to the end of `last_epoch`."""
    found = list(position.left)
    for epoch in range(position.epoch, last_epoch + 1):
        first, row = (position.window, position.row) if epoch == position.epoch else (0, 0)
        todo = windows(urls, seed, epoch, shards_per_window, rank, world_size)[first:]
        found += [Slot(epoch, w.index, row if w.index == first else 0, rank, world_size) for w in todo]
    return found


def deal_again(
    positions: Sequence[StreamPosition],
    urls: Sequence[str],
    seed: int,
    shards_per_window: int,
    rank: int,
    world_size: int,
) -> StreamPosition:
    """Where `rank` of `world_size` begins after ranks that stood at `positions`, rank by rank.

    What these had left up to the end of the epoch that the first of them is in is dealt in turn, the oldest epoch first.
    """
    last, before = max(p.epoch for p in positions), len(positions)
    everyones = [slots_of(p, last, urls, seed, shards_per_window, r, before) for r, p in enumerate(positions)]
    left = sorted((slot for own in everyones for slot in own), key=lambda slot: (slot.epoch, slot.window))
    return StreamPosition(last + 1, left=tuple(left[rank::world_size]))


def row_order(rows: int, seed: int, epoch: int, window: int, pool: int) -> np.ndarray:
    """The permutation (rows,) int64 of pool number `pool` of a window."""
    return np.random.default_rng([seed, epoch, window, pool]).permutation(rows)
