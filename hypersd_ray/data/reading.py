"""Tolerant readers: what is wrong in a shard becomes a `Reject`, never an exception.

We read tars ourselves: `ray.data.read_webdataset` raises tarfile.ReadError ("unexpected end of data") out of the whole
dataset on one truncated tar (seen with Ray 2.60), and Ray's own tolerance, `DataContext.max_errored_blocks`, drops the
shard's good rows with the bad one and does not say which shard it was.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hypersd_ray.config.data import DataConfig, FilterConfig
from hypersd_ray.data.filters import why_rejected
from hypersd_ray.data.images import crop_square, open_image

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "bytes")
CAPTION_COLUMNS = ("caption", "text", "txt", "TEXT", "prompt")
KEY_COLUMNS = ("key", "__key__", "id", "SAMPLE_ID")


@dataclass(frozen=True)
class Sample:
    """One row as it lies in the shard; an empty image or caption means that there is none."""

    key: str
    image: bytes
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """A row that was skipped, or a shard that ended early (`key` is the last one seen, perhaps empty)."""

    reason: str
    shard: str
    key: str


@dataclass(frozen=True)
class Cropped:
    """A row ready for the encoder: pixels (3, R, R) uint8, time_ids (6,) float32."""

    key: str
    caption: str
    pixels: np.ndarray
    time_ids: np.ndarray


def read_rows(url: str, format: str, config: DataConfig) -> Iterator[Cropped | Reject]:
    """Read, filter, decode and crop one shard. Never raises for what is in the shard."""
    samples = read_tar(url) if format == "webdataset" else read_parquet(url)
    for sample in samples:
        yield sample if isinstance(sample, Reject) else _prepare(sample, url, config.resolution, config.filters)


def _prepare(sample: Sample, url: str, resolution: int, filters: FilterConfig) -> Cropped | Reject:
    if not sample.image:
        return Reject("missing_image", url, sample.key)
    if not sample.caption.strip():
        return Reject("empty_caption", url, sample.key)
    try:
        image = open_image(sample.image)
        reason = why_rejected(sample.metadata, image, filters)
        if reason is not None:
            return Reject(reason, url, sample.key)
        pixels, time_ids = crop_square(image, resolution)
    except Exception:  # PIL's plugins raise anything: OSError, SyntaxError, struct.error, its bomb error
        return Reject("broken_image", url, sample.key)
    return Cropped(sample.key, sample.caption.strip(), pixels, time_ids)


def read_tar(url: str) -> Iterator[Sample | Reject]:
    """A WebDataset tar in img2dataset's layout: consecutive KEY.jpg (or png, webp), KEY.txt, KEY.json.

    A tar that ends early or goes bad: its whole rows, then one Reject "truncated_shard". One that cannot be opened:
    one Reject "unreadable_shard".
    """
    key = ""
    parts: dict[str, bytes] = {}
    opened = False
    try:
        with fsspec.open(url, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            opened = True
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if folder + slash + stem != key:
                    if parts:
                        yield _from_parts(key, parts)
                    key, parts = folder + slash + stem, {}
                content = tar.extractfile(member)
                assert content is not None, "a regular file"
                parts[suffix.lower()] = content.read()
            whole = _ends_well(tar.fileobj)
    except Exception:  # tarfile, gzip and fsspec's back ends share no other base class
        yield Reject("truncated_shard" if opened else "unreadable_shard", url, key)
        return
    if parts:
        yield _from_parts(key, parts)
    if not whole:
        yield Reject("truncated_shard", url, key)


def _ends_well(rest: Any) -> bool:
    """Whether a tar's end mark follows. tarfile stops without a word at a damaged header or at a cut between members.

    It has read the first of the mark's two zero blocks; so at least one is left, and nothing but zeros.
    """
    block = rest.read(64 * 1024)
    return bool(block) and not block.strip(b"\0")


def _from_parts(key: str, parts: Mapping[str, bytes]) -> Sample:
    try:
        metadata = json.loads(parts.get("json", b"{}"))
    except ValueError:
        metadata = {}
    metadata = metadata if isinstance(metadata, dict) else {}
    caption = parts["txt"].decode("utf-8", "replace") if "txt" in parts else metadata.get("caption")
    image = next((parts[s] for s in IMAGE_SUFFIXES if parts.get(s)), b"")
    return Sample(key, image, caption if isinstance(caption, str) else "", metadata)


def read_parquet(url: str) -> Iterator[Sample | Reject]:
    """A parquet shard with image bytes (a column, or Hugging Face's {"bytes", "path"}), a caption and metadata columns.

    Without an image column: one Reject "no_image_column". One that goes bad: its rows so far, then "truncated_shard".
    """
    row, key, opened = 0, "", False
    try:
        with fsspec.open(url, "rb") as raw:
            file = pq.ParquetFile(raw)
            opened = True
            names = file.schema_arrow.names
            image = next(
                (n for n in IMAGE_COLUMNS if n in names and _holds_bytes(file.schema_arrow.field(n).type)), None
            )
            if image is None:
                yield Reject("no_image_column", url, "")
                return
            caption, key_column = (
                next((n for n in known if n in names), None) for known in (CAPTION_COLUMNS, KEY_COLUMNS)
            )
            for batch in file.iter_batches(batch_size=32):
                for values in batch.to_pylist():
                    key = str(row if key_column is None else values[key_column])
                    row += 1
                    yield _from_columns(key, values, image, caption)
    except Exception:
        yield Reject("truncated_shard" if opened else "unreadable_shard", url, key)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _from_columns(key: str, values: dict[str, Any], image: str, caption: str | None) -> Sample:
    data = values.pop(image)
    data = data.get("bytes") if isinstance(data, dict) else data
    text = values.get(caption) if caption else None
    return Sample(key, data or b"", text if isinstance(text, str) else "", values)
