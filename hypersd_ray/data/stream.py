"""Batches for one training rank, forever, resumable at any batch.

Every rank runs its own Ray Data execution over its own windows (plan.py), one an epoch. This is deliberate: Ray's
`streaming_split` and `get_dataset_shard` restart a dataset at row 0 when a worker or a run restarts, and how they deal
blocks to ranks depends on timing. Here what rank r reads at a position is a function of (seed, epoch, r), so a position
of three integers in the checkpoint is enough; whole windows before it are never opened. A position that was dealt to
another number of ranks names its windows one by one.

Two threads run ahead of the trainer: one reads the next pool of rows (so an epoch's or a window's start costs no wait),
one cuts `prefetch_batches` batches.

Batch
    latents        (B, C, h, w) float16      prompt_embeds  (B, L, D) float16
    pooled         (B, P) float16            time_ids       (B, 6) float32        (SDXL only)
    key, caption   lists of str
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data import plan, rejects
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.pipeline import Columns, encoded_dataset, precomputed_dataset, split_windows
from hypersd_ray.data.plan import Slot, StreamPosition, Window
from hypersd_ray.data.prefetch import Prefetch
from hypersd_ray.data.sources import detect_format
from hypersd_ray.data.tasks import damaged_shard

Batch = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Rows that are permuted together: pool `number` of a leg's window, from its row `start`; `last` of the window or not."""

    window: int
    number: int
    start: int
    last: bool
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["key"])


@dataclass(frozen=True)
class Leg:
    """Windows that one Ray Data execution reads: what is left of another number of ranks' epochs (`over` is then where to
    go on after it), or an epoch's own."""

    slots: tuple[Slot, ...]
    over: StreamPosition | None = None

    def after(self, index: int, row: int) -> StreamPosition:
        """The position after `row` rows of window `index`."""
        slot = replace(self.slots[index], row=row)
        if self.over is None:
            return StreamPosition(slot.epoch, slot.window, row)
        return replace(self.over, left=(slot, *self.slots[index + 1 :]))

    def past(self, index: int) -> StreamPosition:
        """The position at window `index`'s end: the next one's beginning, so that this is not read again."""
        if self.over is None:
            return StreamPosition(self.slots[index].epoch, self.slots[index].window + 1)
        return replace(self.over, left=self.slots[index + 1 :])


@dataclass(frozen=True)
class _Ordered:
    """A pool with the order in which its rows leave; the first `skip` of them have left before."""

    leg: Leg
    pool: Pool
    order: np.ndarray
    skip: int


class LatentStream:
    """An endless iterator of (batch, position after it) for one rank.

    Two streams with equal arguments give equal batches; one that starts at a position which another gave goes on as
    that one did, bitwise, as long as seed, world size, shards, shards_per_window and shuffle_rows are the same.
    Use within Ray (a driver or a training worker); close it, or use it as a context manager.
    """

    def __init__(
        self,
        config: DataConfig,
        model_path: str,
        urls: Sequence[str],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: StreamPosition = StreamPosition(),  # noqa: B008  frozen
        reject_log: ray.actor.ActorHandle | None = None,
    ) -> None:
        """`reject_log` (rejects.start_reject_log) is shared by all ranks; None: one of this rank's own, without a file.

        Raises ValueError for batch_size < 1, no shards, or a rank outside of the world.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        plan.windows(urls, seed, 0, config.shards_per_window, rank, world_size)
        self.config, self.model_path, self.urls, self.batch_size = config, model_path, tuple(urls), batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._dealing = self.urls, seed, config.shards_per_window
        self.format = detect_format(urls) if config.format == "auto" else config.format
        self.reject_log = reject_log
        if reject_log is None and self.format != "latents":
            self.reject_log = rejects.start_reject_log(config, None)
        self._pools = Prefetch(self._ordered_pools(position), depth=1, name="latent-pools")
        self._batches = Prefetch(self._cut_batches(self._pools), depth=config.prefetch_batches, name="latent-batches")

    def __iter__(self) -> LatentStream:
        return self

    def __next__(self) -> tuple[Batch, StreamPosition]:
        """The next batch and the position to resume after it.

        Raises TooManyRejectsError, ValueError when an epoch has no row for this rank, and what the pipeline raises.
        """
        return next(self._batches)

    @property
    def waited_s(self) -> float:
        """Seconds that the consumer has waited for batches so far."""
        return self._batches.waited_s

    def close(self) -> None:
        """Stop both threads and the Ray Data execution."""
        self._pools.close()
        self._batches.close()

    def __enter__(self) -> LatentStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_batches(self, pools: Iterator[_Ordered]) -> Iterator[tuple[Batch, StreamPosition]]:
        """Batches of exactly `batch_size` rows across pool, window and epoch borders."""
        pieces: list[Columns] = []
        missing = self.batch_size
        for item in pools:
            done = item.skip
            while done < len(item.order):
                chosen = item.order[done : done + missing]
                pieces.append({name: column[chosen] for name, column in item.pool.columns.items()})
                done, missing = done + len(chosen), missing - len(chosen)
                if missing == 0:
                    yield _batch(pieces), _after(item, done)
                    pieces, missing = [], self.batch_size

    def _ordered_pools(self, position: StreamPosition) -> Iterator[_Ordered]:
        """Every leg's pools from `position` on."""
        for leg in self._legs(position):
            found = False
            for pool in cut_pools(self._blocks(leg), self.config.shuffle_rows):
                found, slot = True, leg.slots[pool.window]
                already = max(0, slot.row - pool.start)
                if already < len(pool):
                    order = plan.row_order(len(pool), self.seed, slot.epoch, slot.window, pool.number)
                    yield _Ordered(leg, pool, order, already)
            if not found and leg.slots and leg.over is None and leg.slots[0].window == 0:
                raise ValueError(self._no_rows(leg.slots[0].epoch))

    def _legs(self, position: StreamPosition) -> Iterator[Leg]:
        """What is left of earlier epochs, then each epoch's own windows, the first from `position` on."""
        yield Leg(position.left, replace(position, left=()))
        position = replace(position, left=())
        while True:
            yield Leg(tuple(plan.slots_of(position, position.epoch, *self._dealing, self.rank, self.world_size)))
            position = StreamPosition(position.epoch + 1)

    def _windows(self, leg: Leg) -> list[Window]:
        """The shards of each of its slots, numbered within the leg."""
        dealt = functools.cache(
            lambda epoch, rank, world: plan.windows(self.urls, self.seed, epoch, self._dealing[2], rank, world)
        )
        found = [dealt(slot.epoch, slot.rank, slot.world_size)[slot.window] for slot in leg.slots]
        return [replace(window, index=i) for i, window in enumerate(found)]

    def _blocks(self, leg: Leg) -> Iterator[Columns]:
        """A leg's rows as Ray Data hands them out."""
        todo = self._windows(leg)
        if not todo:
            return
        if self.format == "latents":
            dataset = precomputed_dataset(todo, self.config, near=True)
        else:
            assert self.reject_log is not None, "made in __init__"
            dataset = encoded_dataset(todo, self.format, self.config, self.model_path, self.reject_log)
        try:
            # Not prefetch_batches=0: Ray 2.60 then leaves a parked thread behind each execution.
            for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
                if self.reject_log is not None:
                    rejects.check(self.reject_log)
                if len(block.get("key", ())):
                    yield block
        except ray.exceptions.RayError as error:
            found = damaged_shard(error)
            if found is None:
                raise
            raise found from None
        if self.reject_log is not None:
            rejects.check(self.reject_log)

    def _no_rows(self, epoch: int) -> str:
        shards = f"{len(self.urls)} shards"
        if self.reject_log is not None:
            summary: dict[str, Any] = ray.get(self.reject_log.summary.remote())
            shards += f" (rejected: {summary['rejects']})"
        return (
            f"data.shards: epoch {epoch} has no row for rank {self.rank} of {self.world_size} in {shards}, "
            "at least 1 is needed: add data or use fewer workers"
        )


def cut_pools(blocks: Iterable[Columns], size: int) -> Iterator[Pool]:
    """Regroup blocks (with a column "window", ascending) into pools of `size` rows that do not cross windows."""
    held: list[Columns] = []
    rows = number = 0
    window = -1

    def flush(last: bool) -> Pool:
        columns = {name: np.concatenate([h[name] for h in held]) for name in held[0]}
        return Pool(window, number, number * size, last, columns)

    for found, piece in itertools.chain.from_iterable(map(split_windows, blocks)):
        if held and found != window:
            assert found > window, "Ray Data was told to preserve the order"
            yield flush(last=True)
            held, rows, number = [], 0, 0
        window, start, end = found, 0, len(piece["key"])
        while start < end:
            # A full pool waits for the next row, to know whether it is the window's last.
            if rows == size:
                yield flush(last=False)
                held, rows, number = [], 0, number + 1
            taken = min(end, start + size - rows)
            held.append({name: column[start:taken] for name, column in piece.items()})
            rows, start = rows + taken - start, taken
    if held:
        yield flush(last=True)


def _after(item: _Ordered, done: int) -> StreamPosition:
    """The position after `done` rows of a pool."""
    pool = item.pool
    if pool.last and done == len(pool):
        return item.leg.past(pool.window)
    return item.leg.after(pool.window, pool.start + done)


def _batch(pieces: list[Columns]) -> Batch:
    columns = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    tensors = {name: torch.from_numpy(columns[name]) for name in TENSOR_COLUMNS if name in columns}
    return {**tensors, "key": columns["key"].tolist(), "caption": columns["caption"].tolist()}
