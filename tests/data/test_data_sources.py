"""From patterns to shards."""

from __future__ import annotations

import pytest

from hypersd_ray.config.base import ConfigError
from hypersd_ray.data.sources import expand_braces, find_shards


@pytest.fixture
def folder(tmp_path):
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet", "00000_stats.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_braces():
    assert expand_braces("a{08..11}b{x,y}")[:3] == ["a08bx", "a08by", "a09bx"]
    assert len(expand_braces("a{08..11}b{x,y}")) == 8
    assert expand_braces("plain{}") == ["plain{}"]


def test_files_folders_patterns_and_urls_agree(folder):
    tars = tuple(str(folder / f"0000{i}.tar") for i in range(3))
    for pattern in (f"{folder}", f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar", f"file://{folder}/*.tar"):
        found = find_shards([pattern])
        assert found.urls == tars
        assert found.format == "webdataset"
    assert find_shards([tars[2], f"{folder}/*.tar", tars[0]]).urls == tars


def test_object_stores_keep_their_protocol():
    import fsspec

    with fsspec.open("memory://bucket/b.tar", "wb") as file:
        file.write(b"x")
    assert find_shards(["memory://bucket/*.tar"]).urls == ("memory:///bucket/b.tar",)


def test_latents_are_known_by_their_marker(tmp_path):
    (tmp_path / "a.parquet").touch()
    assert find_shards([str(tmp_path)]).format == "parquet"
    (tmp_path / "latents.json").touch()
    assert find_shards([str(tmp_path)]).format == "latents"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{f}/none-*.tar", "nothing matches"),
        ("{f}/{{00000..00003}}.tar", "00003.tar does not exist"),
        ("{f}/{{3..1}}.tar", "names no shard"),
        ("{f}/00000_stats.json", "cannot tell the format"),
        ("{f}/00000.*", "cannot tell the format"),
        ("nosuch://x/y.tar", "cannot read nosuch"),
    ],
)
def test_what_is_not_there_is_one_line(folder, pattern, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find_shards([pattern.format(f=folder)])
    assert "\n" not in str(caught.value)
    assert "data.shards" in str(caught.value)
