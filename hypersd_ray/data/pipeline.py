"""The Ray Data pipelines from shards to encoded rows.

Image-text shards: read, filter and crop in tasks; encode in an actor pool. Precomputed latents: read in tasks.
Both give the same columns (encode.py) and a column "window", in the order of the windows.

What travels from reading to encoding is a chunk: up to `encoder.batch_size` rows of one shard as one Ray Data row. So
the encoder's batches never mix shards, and a row's numbers do not depend on where in the data a run was resumed.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data.encode import LatentEncoder
from hypersd_ray.data.plan import Window
from hypersd_ray.data.pools import actors
from hypersd_ray.data.tasks import ReadLatents, ReadShard

Columns = dict[str, np.ndarray]


def _items(windows: Sequence[Window]) -> ray.data.Dataset:
    """One row and one block, so one reading task, for each shard, in order.

    A dataset owns a copy of the context, so what is set here does not leak into the user's.
    """
    # Every epoch is an execution: its "Starting execution" lines and its bar would tear the trainer's own bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    items = [{"url": u, "window": w.index, "part": w.part, "parts": w.parts} for w in windows for u in w.urls]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def _reading(config: DataConfig, near: bool = False) -> dict[str, Any]:
    """What a reading task takes. Without reserved cores the number of tasks has a limit of its own, and with `near` they run
    on this node while it has room: else Ray would spread them over nodes whose cores are all others', or without any."""
    if config.reader_cpus:
        return {"num_cpus": config.reader_cpus}
    found: dict[str, Any] = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=2)}
    if near:
        here = ray.get_runtime_context().get_node_id()
        found["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
    return found


def raw_dataset(
    windows: Sequence[Window], format: str, config: DataConfig, reject_log: ray.actor.ActorHandle
) -> ray.data.Dataset:
    """Chunks of filtered, cropped rows of all shards, in order; one reading task a shard."""
    return _items(windows).flat_map(ReadShard(format, config, reject_log), **_reading(config))


def precomputed_dataset(windows: Sequence[Window], config: DataConfig, near: bool = False) -> ray.data.Dataset:
    """Rows of precomputed latents, in order; `near`: see `_reading`.

    Not `ray.data.read_parquet`: Ray 2.60's needs 2 to 5 s to start on 8 files of 3 MB (its older version 0.6 to 1.4 s),
    this 0.3 s, and every epoch starts anew. Besides, this deals rows to ranks where they are read.
    """
    return _items(windows).map_batches(ReadLatents(), batch_size=1, **_reading(config, near))


def encoded_dataset(
    windows: Sequence[Window], format: str, config: DataConfig, model_path: str, reject_log: ray.actor.ActorHandle
) -> ray.data.Dataset:
    """Encoded rows of all shards, in order (columns: see encode.py). The actors live as long as one execution."""
    pool = config.encoder
    return raw_dataset(windows, format, config, reject_log).map_batches(
        LatentEncoder,
        # By what was reserved, not by what is there: an actor may see a GPU that belongs to the trainer.
        fn_constructor_kwargs={
            "model_path": model_path,
            "dtype": pool.dtype,
            "device": "cuda" if pool.num_gpus else "cpu",
        },
        batch_size=1,
        **actors(pool),
    )


def split_windows(block: Columns) -> Iterator[tuple[int, Columns]]:
    """Cut a block of rows where its column "window" changes: (window, rows)."""
    ids = np.asarray(block["window"])
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    for start, end in itertools.pairwise(borders):
        yield int(ids[start]), {name: column[start:end] for name, column in block.items()}


def by_window(dataset: ray.data.Dataset) -> Iterator[tuple[int, Iterator[Columns]]]:
    """(window, its rows piece by piece) in one execution, in order; a window without rows is passed over."""

    def pieces() -> Iterator[tuple[int, Columns]]:
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            if len(block.get("key", ())):
                yield from split_windows(block)

    for window, group in itertools.groupby(pieces(), key=operator.itemgetter(0)):
        yield window, (columns for _, columns in group)
