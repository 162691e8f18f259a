"""Tolerant readers: what is wrong in a shard becomes a `Reject`, never an exception.

We read tars ourselves: `ray.data.read_webdataset` raises tarfile.ReadError ("unexpected end of data") out of the whole
dataset on one truncated tar (seen with Ray 2.60), and Ray's own tolerance, `DataContext.max_errored_blocks`, drops the
shard's good rows with the bad one and does not say which shard it was.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
STORAGE_WAITS_S = (1.0, 5.0, 20.0)
"""Before a shard is read again whose storage failed."""
SHARD_FAULTS = (
    tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error, pa.ArrowException, EOFError, ValueError,
    LookupError, ArithmeticError, FileNotFoundError, IsADirectoryError,
)  # fmt: skip
"""What damaged bytes raise, or a shard that is gone. Everything else is the storage's: time-outs, credentials, limits."""

T = TypeVar("T")


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
    """Read, filter, decode and crop one shard. Never raises for what is in the shard, only for storage that stays away."""
    reader = read_tar if format == "webdataset" else read_parquet
    for sample in reread(reader, url):
        yield sample if isinstance(sample, Reject) else _prepare(sample, url, config.resolution, config.filters)


def reread(
    reader: Callable[[str], Iterator[T]],
    url: str,
    waits_s: Sequence[float] = STORAGE_WAITS_S,
    final: type[Exception] | tuple[type[Exception], ...] = (),
) -> Iterator[T]:
    """What `reader(url)` gives, each once: where storage fails on the way it is read again, after a wait, from there on.
    What is `final` is no failure of storage's, and raised at once."""
    given = 0
    for wait_s in (*waits_s, None):
        try:
            for item in itertools.islice(reader(url), given, None):
                given += 1
                yield item
            return
        except Exception as error:  # storage clients raise exceptions of every kind
            if wait_s is None or isinstance(error, final):
                raise
            time.sleep(wait_s)


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
    except SHARD_FAULTS:
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
    except (*SHARD_FAULTS, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, SHARD_FAULTS) and error.errno is not None:
            raise  # Arrow's own of damaged pages has no number
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
