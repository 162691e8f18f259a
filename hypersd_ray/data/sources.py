"""From what a user names (files, folders, patterns, URLs) to a sorted list of shards and their format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import fsspec

from hypersd_ray.config.base import ConfigError
from hypersd_ray.data.files import exists

Format = Literal["webdataset", "parquet", "latents"]

MARKER = "latents.json"
"""What `precompute` leaves in a folder of latents."""

_TAR = (".tar", ".tar.gz", ".tgz")
_PARQUET = (".parquet",)


@dataclass(frozen=True)
class Sources:
    """Shards in a fixed order, all of one format."""

    urls: tuple[str, ...]
    format: Format


def find_shards(patterns: Sequence[str], format: Format | Literal["auto"] = "auto") -> Sources:
    """Expand braces, wildcards and folders through fsspec; the shards come back sorted, each once.

    Raises ConfigError when a path does not exist, a pattern matches nothing, or the formats are mixed or unknown.
    """
    found: set[str] = set()
    for pattern in patterns:
        for url in expand_braces(pattern):
            found.update(_expand(url, format))
    if not found:
        raise ConfigError(f"data.shards: {', '.join(patterns)} names no shard: a range runs upwards, {{00000..00010}}")
    urls = tuple(sorted(found))
    return Sources(urls, detect_format(urls) if format == "auto" else format)


def detect_format(urls: Sequence[str]) -> Format:
    """By suffix; parquet beside the marker `latents.json` is "latents". Raises ConfigError for a mixture."""
    kinds = {_kind(url) for url in urls}
    if len(kinds) != 1 or None in kinds:
        strange = next((url for url in urls if _kind(url) is None), f"{urls[0]} and {urls[-1]}")
        raise ConfigError(
            f"data.shards: cannot tell the format of {strange}: name .tar or .parquet shards, not both, or "
            "set data.format"
        )
    if kinds == {"webdataset"}:
        return "webdataset"
    folders = {url.rpartition("/")[0] for url in urls}
    return "latents" if all(exists(f"{folder}/{MARKER}") for folder in folders) else "parquet"


def expand_braces(pattern: str) -> list[str]:
    """`{00000..00010}` (zeros kept) and `{a,b}`, as a shell does; braces that are neither stay."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    numbers = () if words is not None else range(int(first), int(last) + 1)
    middles = [f"{i:0{len(first)}d}" for i in numbers] if words is None else words.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [full for middle in middles for full in expand_braces(before + middle + after)]


def _kind(url: str) -> str | None:
    if url.endswith(_TAR):
        return "webdataset"
    return "parquet" if url.endswith(_PARQUET) else None


def _expand(url: str, format: str) -> list[str]:
    """The shards behind one URL without braces."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if any(c in path for c in "*?["):
            found = filesystem.glob(path)
            if not found:
                raise ConfigError(f"data.shards: nothing matches {url}: name existing .tar or .parquet shards")
        elif filesystem.isdir(path):
            found = _in_folder(filesystem.ls(path, detail=False), url, format)
        elif filesystem.exists(path):
            found = [path]
        else:
            raise ConfigError(f"data.shards: {url} does not exist: name an existing file, folder or pattern")
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.shards: cannot read {url}: {error}; check the URL and its credentials") from error
    local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
    return [str(p) if local else filesystem.unstrip_protocol(p) for p in found]


def _in_folder(paths: list[str], url: str, format: str) -> list[str]:
    # img2dataset writes NNNNN.parquet with the metadata, without images, beside each NNNNN.tar: tars come first.
    wanted = {"auto": (_TAR, _PARQUET), "webdataset": (_TAR,)}.get(format, (_PARQUET,))
    for suffixes in wanted:
        found = [p for p in paths if p.endswith(suffixes)]
        if found:
            return found
    kinds = " or ".join(s[0] for s in wanted)
    raise ConfigError(f"data.shards: no {kinds} file in the folder {url}: name a folder with shards")
