"""Files that are whole or not there, what a model's files are told by, and files' rows out of a stream. No Ray."""

from __future__ import annotations

import hashlib
import json

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from hypersd_ray.data import latents
from hypersd_ray.data.files import absolute, digest, exists, write_whole
from hypersd_ray.data.pipeline import by_window


def test_a_models_digest_is_of_names_sizes_and_last_mebibytes(tmp_path):
    """Markers of folders that are there hold it: it must never change."""
    (tmp_path / "vae").mkdir()
    small, large = tmp_path / "vae" / "config.json", tmp_path / "vae" / "weights"
    small.write_bytes(b"{}")
    large.write_bytes(b"xyz" + bytes(2**20))
    expected = hashlib.sha256(b"vae/config.json 2 {}" + b"vae/weights 1048579 " + bytes(2**20)).hexdigest()[:16]
    assert digest(tmp_path, [small, large]) == expected


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    filesystem, path = fsspec.core.url_to_fs(str(tmp_path / "a"))
    for text in (b"1", b"2"):
        with write_whole(filesystem, path) as file:
            file.write(text)
    with pytest.raises(TypeError), write_whole(filesystem, path) as file:
        file.writelines([b"half", None])
    assert (tmp_path / "a").read_bytes() == b"2" and exists(path) and not exists(f"{path}/b")
    assert absolute("s3://b/c") == "s3://b/c" and absolute("~/x/../c").endswith("/c") and "~" not in absolute("~/c")


def test_a_marker_is_read_as_it_was_written_and_refuses_another_runs(tmp_path):
    marker = {"complete": True, "files": {"\u00e9.parquet": 3}, "resolution": 8}
    latents.write_marker(*fsspec.core.url_to_fs(str(tmp_path)), marker)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]
    assert latents.check_marker(f"{tmp_path}/", {"resolution": 8}) == marker
    assert (tmp_path / "latents.json").read_text() == json.dumps(marker, indent=1)
    with pytest.raises(ValueError, match="made with resolution=8, this run has resolution=16"):
        latents.check_marker(str(tmp_path), {"resolution": 16})


class Blocks:
    """A dataset of blocks: a window of each row."""

    def __init__(self, *windows: list[int]):
        self.windows = windows

    def iter_batches(self, **_):
        for window in self.windows:
            n = len(window)
            texts = {name: np.array([f"{name} {i}" for i in range(n)], dtype=object) for name in ("key", "caption")}
            numbers = {"latents": np.full((n, 4, 2, 2), n, np.float16), "row": np.arange(n)}
            yield {"window": np.array(window), **texts, **numbers} if n else {}


def test_a_windows_rows_are_one_file_whatever_blocks_they_came_in(tmp_path):
    filesystem, root = fsspec.core.url_to_fs(str(tmp_path))
    for window, pieces in by_window(Blocks([0, 0, 2], [], [2, 2])):
        tables = [latents.table([piece]) for piece in pieces]
        with latents.open_file(filesystem, f"{root}/{window}", tables[0].schema) as writer:
            assert latents.add(writer, tables) == {0: 2, 2: 3}[window]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]
    file = pq.ParquetFile(tmp_path / "2")
    assert file.num_row_groups == 2
    assert file.read().column("key").to_pylist() == ["key 2", "key 0", "key 1"]
    assert file.schema_arrow.names == ["key", "caption", "row", "latents"]
