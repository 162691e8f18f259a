"""Files of any fsspec URL, and what folders on this machine hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec


def is_url(path: str) -> bool:
    """True for s3://..., gs://... and the like."""
    return "://" in path


def absolute(path: str) -> str:
    """Workers change directory, so a local path must not be relative."""
    return path if is_url(path) else str(Path(path).expanduser().resolve())


def exists(url: str) -> bool:
    """Whether a file or folder is there. Raises what storage raises when it cannot say."""
    try:
        size(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int | None:
    """Bytes of a file, None of some folders. Raises FileNotFoundError; fsspec's own `exists` takes every error for absence."""
    filesystem, path = fsspec.core.url_to_fs(url)
    found: int | None = filesystem.info(path).get("size")
    return found


@contextmanager
def write_whole(filesystem: Any, path: str) -> Iterator[IO[bytes]]:
    """A file to write, which has its name only when the block has ended well: `{path}.part` till then."""
    with filesystem.open(f"{path}.part", "wb") as file:
        yield file
    filesystem.mv(f"{path}.part", path)


def write_json(filesystem: Any, path: str, value: Any) -> None:
    """A small file that people read too; what was there is replaced whole."""
    with write_whole(filesystem, path) as file:
        file.write(json.dumps(value, indent=1).encode())


def digest(root: Path, files: Iterable[Path]) -> str:
    """Of a model's files below `root`: by name, size and last MiB, so that weights need not be read. Not of the path."""
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.relative_to(root)} {size} ".encode())
        with file.open("rb") as data:
            data.seek(max(0, size - 2**20))
            found.update(data.read())
    return found.hexdigest()[:16]
