"""What is wrong in a shard is a reject with a reason; the good rows come through."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersd_ray.config.data import DataConfig, FilterConfig
from hypersd_ray.data.reading import Cropped, Reject, read_parquet, read_rows, read_tar, reread
from hypersd_ray.data.tasks import DamagedShardError, ReadLatents
from tests.data.data_shards import EMBEDDED, png, row, write_tar


def outcome(path: Path, format: str = "webdataset", **filters: float) -> tuple[list[str], list[tuple[str, str]]]:
    """(keys of good rows, (reason, key) of rejects)."""
    config = DataConfig(shards=str(path), resolution=8, filters=FilterConfig(**filters))
    rows = list(read_rows(str(path), format, config))
    assert all(r.shard == str(path) for r in rows if isinstance(r, Reject))
    good = [r.key for r in rows if isinstance(r, Cropped)]
    return good, [(r.reason, r.key) for r in rows if isinstance(r, Reject)]


def test_embedded_shard_reads_whole():
    good, rejects = outcome(EMBEDDED / "val-00001.tar")
    assert len(good) == 128
    assert rejects == []


def test_flawed_rows_are_named_and_skipped(tmp_path):
    cut_png = png(3)[:100]
    members = [
        *row("good", 1),
        ("broken.png", cut_png), ("broken.txt", b"a cat"),
        ("noimage.png", b"not an image at all"), ("noimage.txt", b"a cat"),
        ("empty.png", png(4)), ("empty.txt", b"  \n"),
        ("uncaptioned.png", png(5)),
        ("captioned_in_json.png", png(6)), ("captioned_in_json.json", b'{"caption": "a dog"}'),
        ("textonly.txt", b"a cat"),
        ("badjson.png", png(7)), ("badjson.txt", b"a cat"), ("badjson.json", b"{"),
        *row("last", 2),
    ]  # fmt: skip
    good, rejects = outcome(write_tar(tmp_path / "a.tar", members))
    assert good == ["good", "captioned_in_json", "badjson", "last"]
    assert rejects == [
        ("broken_image", "broken"), ("broken_image", "noimage"), ("empty_caption", "empty"),
        ("empty_caption", "uncaptioned"), ("missing_image", "textonly"),
    ]  # fmt: skip


def test_a_cut_tar_keeps_its_whole_rows_wherever_it_is_cut(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(4) for m in row(str(i), i)]).read_bytes()
    end = whole.rindex(b"ustar") + 512
    for cut in range(600, end, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        good, rejects = outcome(path)
        assert good == [str(i) for i in range(len(good))]
        assert len(good) < 4 or cut > end - 1024
        assert rejects[-1][0] == "truncated_shard", cut


def test_a_damaged_header_and_a_file_that_is_no_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in row(str(i), i)])
    data = bytearray(path.read_bytes())
    header = data.index(b"2.png")
    data[header : header + 512] = b"x" * 512
    path.write_bytes(data)
    assert outcome(path) == (["0", "1"], [("truncated_shard", "1")])
    path.write_bytes(b"no tar " * 500)
    assert outcome(path) == ([], [("unreadable_shard", "")])
    assert outcome(tmp_path / "gone.tar") == ([], [("unreadable_shard", "")])


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_bytes_and_hugging_face_structs(tmp_path, nested):
    images = [png(0), b"broken", None, png(3)]
    table = pa.table(
        {
            "image": [{"bytes": i, "path": None} for i in images] if nested else pa.array(images, pa.binary()),
            "text": ["a cat", "a dog", "a dog", None],
            "id": [10, 11, 12, 13],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rejects = [("broken_image", "11"), ("missing_image", "12"), ("empty_caption", "13")]
    assert outcome(tmp_path / "a.parquet", "parquet") == (["10"], rejects)


def test_parquet_that_cannot_be_read_or_has_no_image(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert outcome(path, "parquet") == ([], [("unreadable_shard", "")])
    pq.write_table(pa.table({"URL": ["http://x"], "TEXT": ["a cat"]}), path)
    assert outcome(path, "parquet") == ([], [("no_image_column", "")])
    table = pa.table({"image": [png(i) for i in range(64)], "caption": ["a cat"] * 64})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=32, compression="none", use_dictionary=False)
    data = bytearray(out.getvalue())
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    good, rejects = outcome(path, "parquet")
    assert len(good) == 32
    assert rejects == [("truncated_shard", "31")]


def test_filters_count_by_reason(tmp_path):
    members = [m for i in range(10) for m in row(str(i), i, aesthetic=float(i), pwatermark=i / 10)]
    path = write_tar(tmp_path / "a.tar", members)
    good, rejects = outcome(path, min_aesthetic=3, max_watermark=0.75)
    assert good == ["3", "4", "5", "6", "7"]
    assert Counter(reason for reason, _ in rejects) == {"low_aesthetic": 3, "watermark": 2}
    assert np.all([len(outcome(path, min_side=s)[0]) == n for s, n in ((16, 10), (17, 0))])


def test_storage_that_fails_for_a_while_costs_no_row(tmp_path):
    """A time-out in the middle of a shard is nobody's data: it is read again, each row comes once."""
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in row(str(i), i)])
    failures = [TimeoutError("slow"), ConnectionResetError("gone")]

    def flaky(url):
        for i, sample in enumerate(read_tar(url)):
            if i == 2 and failures:
                raise failures.pop()
            yield sample

    assert [sample.key for sample in reread(flaky, str(path), waits_s=(0, 0))] == ["0", "1", "2", "3"]
    failures = [PermissionError("expired")] * 3
    with pytest.raises(PermissionError, match="expired"):
        list(reread(flaky, str(path), waits_s=(0, 0)))


def test_latents_too_are_read_again_and_a_damaged_file_is_not(tmp_path):
    path, aside = tmp_path / "a.parquet", tmp_path / "aside"
    pq.write_table(pa.table({"row": [0, 1, 2, 3]}), aside)
    path.symlink_to(path)  # reading it raises OSError
    threading.Timer(0.3, lambda: aside.replace(path)).start()
    item = {"url": np.array([str(path)]), "window": np.array([7]), "part": np.array([1]), "parts": np.array([2])}
    (table,) = ReadLatents()(item)
    assert table.to_pydict() == {"row": [1, 3], "window": [7, 7]}
    path.write_bytes(b"PAR1 but not really")
    begun = time.monotonic()
    with pytest.raises(DamagedShardError, match="is damaged"):
        list(ReadLatents()(item))
    assert time.monotonic() - begun < 1, "no wait would mend it"


@pytest.mark.parametrize("reader", [read_tar, read_parquet])
def test_what_storage_says_is_not_taken_for_damage(reader, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "403")

    monkeypatch.setattr("fsspec.open", refuse)
    with pytest.raises(PermissionError):
        list(reader("s3://bucket/a.tar"))
