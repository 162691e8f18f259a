"""Batches for one training rank, forever, resumable at any batch.

Every rank runs its own Ray Data execution over its own windows (plan.py), one an epoch. This is deliberate: Ray's
`streaming_split` and `get_dataset_shard` restart a dataset at row 0 when a worker or a run restarts, and how they deal
blocks to ranks depends on timing. Here what rank r reads at a position is a function of (seed, epoch, r), so a position
of three integers in the checkpoint is enough; whole windows before it are never opened.

Two threads run ahead of the trainer: one reads the next pool of rows (so an epoch's or a window's start costs no wait),
one cuts `prefetch_batches` batches.

Batch
    latents        (B, C, h, w) float16      prompt_embeds  (B, L, D) float16
    pooled         (B, P) float16            time_ids       (B, 6) float32        (SDXL only)
    key, caption   lists of str
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data import plan, rejects
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.pipeline import Columns, encoded_dataset, precomputed_dataset, split_windows
from hypersd_ray.data.plan import StreamPosition
from hypersd_ray.data.prefetch import Prefetch
from hypersd_ray.data.sources import detect_format
from hypersd_ray.data.tasks import damaged_shard

Batch = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Rows that are permuted together: pool `number` of a window, from its row `start`; `last` of the window or not."""

    window: int
    number: int
    start: int
    last: bool
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["key"])


@dataclass(frozen=True)
class _Ordered:
    """A pool with the order in which its rows leave; the first `skip` of them have left before."""

    epoch: int
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
        """Every epoch's pools from `position` on."""
        epoch, first, skip = position.epoch, position.window, position.row
        while True:
            found = False
            for pool in cut_pools(self._blocks(epoch, first), self.config.shuffle_rows):
                found = True
                already = max(0, skip - pool.start) if pool.window == position.window and epoch == position.epoch else 0
                if already < len(pool):
                    order = plan.row_order(len(pool), self.seed, epoch, pool.window, pool.number)
                    yield _Ordered(epoch, pool, order, already)
            if not found and first == 0:
                raise ValueError(self._no_rows(epoch))
            epoch, first = epoch + 1, 0

    def _blocks(self, epoch: int, first_window: int) -> Iterator[Columns]:
        """The epoch's rows of this rank as Ray Data hands them out, from window `first_window` on."""
        shards_per_window = self.config.shards_per_window
        todo = plan.windows(self.urls, self.seed, epoch, shards_per_window, self.rank, self.world_size)[first_window:]
        if not todo:
            return
        if self.format == "latents":
            dataset = precomputed_dataset(todo, self.config)
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
    """The position after `done` rows of a pool; at a window's end the next one's, so that this is not read again."""
    pool = item.pool
    if pool.last and done == len(pool):
        return StreamPosition(item.epoch, pool.window + 1, 0)
    return StreamPosition(item.epoch, pool.window, pool.start + done)


def _batch(pieces: list[Columns]) -> Batch:
    columns = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    tensors = {name: torch.from_numpy(columns[name]) for name in TENSOR_COLUMNS if name in columns}
    return {**tensors, "key": columns["key"].tolist(), "caption": columns["caption"].tolist()}
