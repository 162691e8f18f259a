"""A folder of latents: its marker and its parquet files, as precompute.py fills them with encoded pictures and
trainer/pairs.py with the ends of an ODE."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.extensions import ArrowTensorArray

from hypersd_ray.config.base import ConfigError
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.files import exists, write_json, write_whole
from hypersd_ray.data.pipeline import Columns
from hypersd_ray.data.sources import MARKER


def check_marker(folder: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The marker of a folder of latents, {} when there is none. Raises ConfigError where it differs from `wanted`."""
    url = f"{folder.rstrip('/')}/{MARKER}"
    if not exists(url):
        return {}
    with fsspec.open(url, "r", encoding="utf-8") as file:
        marker = json.load(file)
    for name, value in wanted.items():
        if marker.get(name) != value:
            made_with = f"by {marker.get('model')}" if name == "model_hash" else f"with {name}={marker.get(name)}"
            raise ConfigError(
                f"{url}: its latents were made {made_with}, this run has {name}={value}: "
                "name another folder (data.cache_dir, --out) or precompute again"
            )
    return marker


def write_marker(filesystem: Any, root: str, marker: dict[str, Any]) -> None:
    """Replace the marker whole."""
    write_json(filesystem, f"{root}/{MARKER}", marker)


def table(pieces: Sequence[Columns]) -> pa.Table:
    """Rows as they lie in a file, of pieces one behind the other."""

    def whole(name: str) -> np.ndarray:
        return np.concatenate([p[name] for p in pieces])

    tensors = {n: ArrowTensorArray.from_numpy(whole(n)) for n in TENSOR_COLUMNS if n in pieces[0]}
    texts = {n: pa.array(whole(n).tolist(), pa.string()) for n in ("key", "caption")}
    return pa.table({**texts, "row": pa.array(whole("row"), pa.int64()), **tensors})


@contextmanager
def open_file(filesystem: Any, path: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file of latents to write, whole or not at all."""
    with (
        write_whole(filesystem, path) as file,
        # No dictionaries and no compression: float16 noise does not shrink (zstd: 8%), and reading is faster.
        pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer,
    ):
        yield writer


def add(writer: pq.ParquetWriter, tables: Iterable[pa.Table]) -> int:
    """A row group for each table; -> how many rows."""
    rows = 0
    for one in tables:
        writer.write_table(one, row_group_size=len(one))
        rows += len(one)
    return rows
