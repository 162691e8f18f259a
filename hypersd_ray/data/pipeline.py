"""The Ray Data pipelines from shards to encoded rows.

Image-text shards: read, filter and crop in tasks; encode in an actor pool. Precomputed latents: read in tasks.
Both give the same columns (encode.py) and a column "window", in the order of the windows.

What travels from reading to encoding is a chunk: up to `encoder.batch_size` rows of one shard as one Ray Data row. So the
encoder's batches never mix shards, and a row's numbers do not depend on where in the data a run was resumed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data.encode import LatentEncoder
from hypersd_ray.data.plan import Window
from hypersd_ray.data.reading import Cropped, Reject, read_rows

Columns = dict[str, np.ndarray]


class ReadShard:
    """For `flat_map`: {"url", "window", "part", "parts"} -> chunks. Reports the shard's rejects once, at its end."""

    def __init__(self, format: str, config: DataConfig, reject_log: ray.actor.ActorHandle) -> None:
        self.format, self.config, self.reject_log = format, config, reject_log

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of the kept rows `part`, `part + parts`, ... of the shard."""
        rejects: list[tuple[str, str]] = []
        rows: list[tuple[int, Cropped]] = []
        kept = 0
        for row in read_rows(item["url"], self.format, self.config):
            if isinstance(row, Reject):
                rejects.append((row.reason, row.key))
                continue
            if kept % item["parts"] == item["part"]:
                rows.append((kept, row))
            kept += 1
            if len(rows) == self.config.encoder.batch_size:
                yield _chunk(item, rows)
                rows = []
        if rows:
            yield _chunk(item, rows)
        # Waits, so that the report is in before the task ends: whoever sees the next shard can ask for this one's.
        ray.get(self.reject_log.report.remote(item["url"], kept + len(rejects), rejects))


def _chunk(item: dict[str, Any], rows: list[tuple[int, Cropped]]) -> dict[str, Any]:
    return {
        "shard": item["url"],
        "window": item["window"],
        "row": np.array([i for i, _ in rows], dtype=np.int64),
        "key": [r.key for _, r in rows],
        "caption": [r.caption for _, r in rows],
        "pixels": np.stack([r.pixels for _, r in rows]),
        "time_ids": np.stack([r.time_ids for _, r in rows]),
    }


class ReadLatents:
    """For `map_batches` with batch_size=1: a file of `precompute` -> its rows `part`, `part + parts`, ..."""

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """One table a row group. A file that cannot be read is an error: it is our own product, not the user's data."""
        url, window, part, parts = (batch[name][0] for name in ("url", "window", "part", "parts"))
        with fsspec.open(str(url), "rb") as raw:
            file = pq.ParquetFile(raw)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                if parts > 1:
                    table = table.take(np.flatnonzero(table.column("row").to_numpy() % parts == part))
                yield table.append_column("window", pa.array(np.full(len(table), window, dtype=np.int64)))


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


def raw_dataset(
    windows: Sequence[Window], format: str, config: DataConfig, reject_log: ray.actor.ActorHandle
) -> ray.data.Dataset:
    """Chunks of filtered, cropped rows of all shards, in order; one reading task a shard."""
    return _items(windows).flat_map(ReadShard(format, config, reject_log), num_cpus=config.reader_cpus)


def precomputed_dataset(windows: Sequence[Window], config: DataConfig) -> ray.data.Dataset:
    """Rows of precomputed latents, in order.

    Not `ray.data.read_parquet`: Ray 2.60's needs 2 to 5 s to start on 8 files of 3 MB (its older version 0.6 to 1.4 s),
    this 0.3 s, and every epoch starts anew. Besides, this deals rows to ranks where they are read.
    """
    return _items(windows).map_batches(ReadLatents(), batch_size=1, num_cpus=config.reader_cpus)


def encoded_dataset(
    windows: Sequence[Window], format: str, config: DataConfig, model_path: str, reject_log: ray.actor.ActorHandle
) -> ray.data.Dataset:
    """Encoded rows of all shards, in order (columns: see encode.py). The actors live as long as one execution."""
    pool = config.encoder
    return raw_dataset(windows, format, config, reject_log).map_batches(
        LatentEncoder,
        fn_constructor_kwargs={"model_path": model_path, "dtype": pool.dtype},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        label_selector=pool.label_selector or None,
    )


def split_windows(block: Columns) -> Iterator[tuple[int, Columns]]:
    """Cut a block of rows where its column "window" changes: (window, rows)."""
    ids = np.asarray(block["window"])
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    for start, end in itertools.pairwise(borders):
        yield int(ids[start]), {name: column[start:end] for name, column in block.items()}
