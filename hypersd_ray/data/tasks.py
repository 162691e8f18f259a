"""What the reading tasks of pipeline.py run.

No torch here: a new Ray worker imports this module before its first task, and with torch several of them starting on
two cores took 11 s instead of 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data.reading import Cropped, Reject, read_rows, reread


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
        """One table a row group.

        Raises:
            DamagedShardError: the file is gone or no whole parquet file: it is our own product, not the user's data.
        """
        url, window, part, parts = (batch[name][0] for name in ("url", "window", "part", "parts"))
        for table in reread(_row_groups, str(url), final=DamagedShardError):
            if parts > 1:
                table = table.take(np.flatnonzero(table.column("row").to_numpy() % parts == part))
            yield table.append_column("window", pa.array(np.full(len(table), window, dtype=np.int64)))


def _row_groups(url: str) -> Iterator[pa.Table]:
    try:
        with fsspec.open(url, "rb") as raw:
            file = pq.ParquetFile(raw)
            yield from map(file.read_row_group, range(file.num_row_groups))
    except (FileNotFoundError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        reason = (
            "is not there"
            if isinstance(error, FileNotFoundError)
            else f"is damaged ({' '.join(str(error).split()):.120})"
        )
        raise DamagedShardError(
            f"{MARK}data.shards: {url} {reason}; make it again with jobs/precompute.py (delete it first), or train from the "
            f"pictures{MARK}"
        ) from None


class DamagedShardError(ValueError):
    """A file of latents that cannot be read; one line between two MARKs, since Ray Data passes on only text."""


MARK = "\u2063"
"""Invisible."""


def damaged_shard(error: BaseException) -> ValueError | None:
    """What a `DamagedShardError` said, from whatever Ray has wrapped it into; None where it was something else."""
    pieces = str(error).split(MARK)
    return ValueError(pieces[1]) if "DamagedShardError" in str(error) and len(pieces) >= 3 else None
