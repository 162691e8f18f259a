"""Encode image-text shards once, into a folder of latent parquet that later runs read.

    out/latents.json                 the marker: what the latents belong to, the files, rows and rejects
    out/{shard's stem}-{hash}.parquet   one file a shard: key, caption, row and the tensor columns of encode.py
    out/rejects.jsonl                what was skipped

A file appears under its name only when it is whole, and carries its shard's counts in its footer: a run that was killed
goes on behind the last whole file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import DataConfig
from hypersd_ray.data import latents, rejects
from hypersd_ray.data.encode import TENSOR_COLUMNS
from hypersd_ray.data.files import digest
from hypersd_ray.data.pipeline import Columns, by_window, encoded_dataset
from hypersd_ray.data.plan import Window
from hypersd_ray.data.sources import Sources, find_shards

ROW_GROUP_BYTES = 64 * 2**20
_FOOTER = b"hypersd_ray"
_ENCODING_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Summary:
    """What a call of `precompute` did; rows, seen and rejects are of the whole folder."""

    out: str
    shards: int
    shards_skipped: int
    rows: int
    seen: int
    rejects: dict[str, int]
    rows_per_s: float
    """Rows that this call wrote, per second of this call; 0 when all was there."""


def precompute(
    config: DataConfig, model_path: str, out: str, progress: Callable[[int, int, int], None] | None = None
) -> Summary:
    """Encode what `config.shards` names into `out` (a folder, any fsspec URL); shards that are there are skipped.

    `progress(shards done, shards in all, rows written)` is called after each shard. The rows pass through this process,
    which writes them in order. Raises ConfigError when `out` holds latents of another model, resolution or filters,
    TooManyRejectsError past config.max_reject_share.
    """
    sources, belongs = validate(config, model_path, out)
    model_path = str(Path(model_path).resolve())  # Ray's actors run in other working directories
    folder = _Folder(*fsspec.core.url_to_fs(out))
    folder.filesystem.makedirs(folder.root, exist_ok=True)
    done = {url: footer for url in sources.urls if (footer := folder.footer(url))}
    todo = [url for url in sources.urls if url not in done]
    skipped = len(done)
    started, written = time.perf_counter(), 0
    if todo:
        started_with = {"complete": False, "model": model_path, **belongs, **_totals(sources.urls, done)}
        latents.write_marker(folder.filesystem, folder.root, started_with)
        log = rejects.start_reject_log(config, f"{out.rstrip('/')}/rejects.jsonl", out.rstrip("/").rpartition("/")[2])
        for url, footer in done.items():
            ray.get(log.count.remote(url, footer["seen"], footer["rejects"]))
        for url, pieces in _shards_in_order(todo, sources.format, config, model_path, log):
            done[url] = folder.write(url, pieces, log)
            written += done[url]["rows"]
            rejects.check(log)
            if progress is not None:
                progress(len(done), len(sources.urls), written)
    elapsed = time.perf_counter() - started
    totals = _totals(sources.urls, done)
    complete = {"complete": True, **belongs, **totals}
    # Runs that share latents come by at once with nothing to do: one that wrote would pull the file from under another.
    if todo or any(
        value != latents.check_marker(out, {}).get(name) for name, value in json.loads(json.dumps(complete)).items()
    ):
        latents.write_marker(folder.filesystem, folder.root, complete | {"model": model_path})
    return Summary(
        out,
        len(done),
        skipped,
        totals["rows"],
        totals["seen"],
        totals["rejects"],
        written / elapsed if written else 0.0,
    )


def validate(config: DataConfig, model_path: str, out: str) -> tuple[Sources, dict[str, Any]]:
    """What can be known before Ray starts: (the shards, what the marker says the latents belong to).

    Raises ConfigError for shards or a model that are not there, and for an `out` that belongs to another run.
    """
    sources = find_shards(config.patterns, config.format)
    if sources.format == "latents":
        raise ConfigError(f"data.shards: {config.patterns[0]} holds latents already: name image-text shards")
    belongs = {
        "model_hash": fingerprint(model_path),
        "resolution": config.resolution,
        "filters": config.filters.model_dump(),
    }
    latents.check_marker(out, belongs)
    return sources, belongs


def resolve(
    config: DataConfig, model_path: str, run_folder: str, progress: Callable[[int, int, int], None] | None = None
) -> Sources:
    """What a training run streams, settled once in the driver: latents as they are, after precomputing if
    config.cache is "disk" (`progress` as in `precompute`), or the image-text shards.

    Give its `urls` to every LatentStream, with config.format set to its `format`. Raises ConfigError for shards that
    are not there, and for latents of another model or resolution.
    """
    sources = find_shards(config.patterns, config.format)
    if sources.format != "latents":
        if config.cache == "none":
            return sources
        out = config.cache_dir or f"{run_folder.rstrip('/')}/latents"
        precompute(config, model_path, out, progress)
        sources = find_shards((out,), "latents")
    wanted = {"model_hash": fingerprint(model_path), "resolution": config.resolution}
    listed: set[str] = set()
    for folder in sorted({url.rpartition("/")[0] for url in sources.urls}):
        marker = latents.check_marker(folder, wanted)
        if not marker or not marker["complete"]:
            raise ConfigError(
                f"data.shards: the latents in {folder} are not complete: run jobs/precompute.py on it (again)"
            )
        listed.update(f"{folder}/{name}" for name in marker["files"])
    # A file that the marker does not name is left over from another list of shards.
    return Sources(tuple(url for url in sources.urls if url in listed), "latents")


def rejected(sources: Sources) -> str:
    """What was rejected when the latents of `sources` were made, in a line; nothing where nothing was."""
    lines = []
    for folder in sorted({url.rpartition("/")[0] for url in sources.urls}):
        marker = latents.check_marker(folder, {})
        summary = {"seen": marker["seen"], "rejects": marker["rejects"], "rejected": sum(marker["rejects"].values())}
        lines.append(rejects.told(summary, f"{folder}/rejects.jsonl"))
    return "; ".join(filter(None, lines))


def fingerprint(model_path: str) -> str:
    """A hash of what encodes: configs and tokenizers whole, weights by name, size and last MiB. Not of the path.

    Raises ConfigError when the folder holds none of them.
    """
    root = Path(model_path)
    files = [f for part in _ENCODING_PARTS for f in sorted((root / part).glob("*")) if f.is_file()]
    if not files:
        raise ConfigError(f"the model {model_path} has no vae/ and text_encoder/: name a folder in diffusers format")
    return digest(root, files)


@dataclass(frozen=True)
class _Folder:
    """The folder of latents on its file system."""

    filesystem: Any
    root: str

    def path(self, url: str) -> str:
        """The file of a shard: named by its stem, told from another folder's by a hash of its URL."""
        stem = url.rpartition("/")[2].partition(".")[0]
        return f"{self.root}/{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"

    def footer(self, url: str) -> dict[str, Any] | None:
        """{"rows", "seen", "rejects", "columns", "file"} of a shard that is whole, else None."""
        path = self.path(url)
        if not self.filesystem.exists(path):
            return None
        with self.filesystem.open(path, "rb") as file:
            return json.loads(pq.ParquetFile(file).metadata.metadata[_FOOTER])

    def write(self, url: str, pieces: Iterator[Columns], log: ray.actor.ActorHandle) -> dict[str, Any]:
        """Write one shard's rows; -> its footer."""
        path = self.path(url)
        groups = _row_groups(pieces)
        first = next(groups, None)
        schema = (
            first.schema
            if first is not None
            else pa.schema({"key": pa.string(), "caption": pa.string(), "row": pa.int64()})
        )
        with latents.open_file(self.filesystem, path, schema) as writer:
            rows = latents.add(writer, () if first is None else itertools.chain([first], groups))
            counts: dict[str, Any] = ray.get(log.shard.remote(url))
            shapes = {f.name: list(f.type.shape) for f in schema if hasattr(f.type, "shape")}
            footer = {"file": path.rpartition("/")[2], "rows": rows, **counts, "columns": shapes}
            writer.add_key_value_metadata({_FOOTER: json.dumps(footer).encode()})
        return footer


def _shards_in_order(
    urls: Sequence[str], format: str, config: DataConfig, model_path: str, log: ray.actor.ActorHandle
) -> Iterator[tuple[str, Iterator[Columns]]]:
    """(shard, its encoded rows piece by piece), a shard without rows too; one Ray Data execution for all."""
    windows = [Window(i, (url,)) for i, url in enumerate(urls)]
    dataset = encoded_dataset(windows, format, config, model_path, log)

    following = 0
    for index, pieces in by_window(dataset):
        yield from ((url, iter(())) for url in urls[following:index])
        yield urls[index], pieces
        following = index + 1
    yield from ((url, iter(())) for url in urls[following:])


def _row_groups(pieces: Iterator[Columns]) -> Iterator[pa.Table]:
    """Tables of at least ROW_GROUP_BYTES, but for the last."""
    held: list[Columns] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += sum(piece[name].nbytes for name in TENSOR_COLUMNS if name in piece)
        if size >= ROW_GROUP_BYTES:
            yield latents.table(held)
            held, size = [], 0
    if held:
        yield latents.table(held)


def _totals(urls: Sequence[str], footers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the marker says of all shards that are done."""
    done = [footers[url] for url in urls if url in footers]
    counter = rejects.RejectCounter(None, 1.0, 0)
    for footer in done:
        counter.count(footer["file"], footer["seen"], footer["rejects"])
    total = counter.summary()
    return {
        "rows": sum(f["rows"] for f in done),
        "seen": total["seen"],
        "rejects": total["rejects"],
        "columns": next((f["columns"] for f in done if f["columns"]), {}),
        "files": {f["file"]: f["rows"] for f in done},
    }
