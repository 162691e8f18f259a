"""A run's folder, local or at any fsspec URL.

{out}/{name}/config.yaml  metrics.jsonl  tensorboard/  checkpoint_*/  lora/  grid.png  curves.png
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec

from hypersd_ray.config.base import RunError
from hypersd_ray.config.run import RunConfig
from hypersd_ray.data.files import absolute, exists, is_url

T = TypeVar("T")


class StorageError(RunError):
    """What could not be written or read for longer than the run was to wait. It may be one worker's trouble alone."""


def out_folder(run: RunConfig) -> str:
    """`run.out`, absolute. A job's uploaded working directory is Ray's to delete, so there it is under the home."""
    if is_url(run.out) or "runtime_resources" not in Path.cwd().parts:
        return absolute(run.out).rstrip("/")
    return str(Path.home() / Path(run.out).expanduser())


def run_folder(run: RunConfig) -> str:
    """The run's own folder."""
    return f"{out_folder(run)}/{run.name}"


def read_text(path: str) -> str:
    """A small text file."""
    with fsspec.open(path, "rt") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    """Write a small text file, making its folder; whole or not at all."""
    if is_url(path):
        with fsspec.open(path, "wt") as file:
            file.write(text)
        return
    whole, part = Path(path), Path(f"{path}.part")
    whole.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text)
    part.replace(whole)


def put(local: Path, path: str) -> None:
    """Copy a file or folder made in a temporary place to where it belongs."""
    fs, plain = fsspec.core.url_to_fs(path)
    fs.makedirs(plain.rsplit("/", 1)[0], exist_ok=True)
    fs.put(str(local), plain, recursive=local.is_dir())


CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3"})
"""Packages behind fsspec URLs; what they raise when a server is away is not always an OSError."""


def is_trouble(error: BaseException) -> bool:
    """Whether storage, and not our own code, is at fault."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS


@contextmanager
def tolerant() -> Iterator[None]:
    """What storage refuses within the block is let go."""
    try:
        yield
    except Exception as error:
        if not is_trouble(error):
            raise


WRITING = "written", "make room or mend the storage, set run.out to another"
READING = "read", "mend the storage, delete what cannot be read"


PATIENCE = "run.storage_patience_s"


def patiently(
    action: Callable[[], T],
    what: str,
    patience_s: float,
    doing: tuple[str, str] = WRITING,
    knob: str | None = PATIENCE,
) -> T:
    """What `action` gives, tried again and again while storage refuses it; says so at the first refusal and when it is over.

    Raises:
        StorageError: refused for `patience_s` seconds, the setting `knob`; one line with what, why and the settings.
    """
    done, mend = doing
    begun, pause, refused = time.monotonic(), 0.5, False
    while True:
        try:
            result = action()
        except Exception as error:
            if not is_trouble(error):
                raise
            waited, reason = time.monotonic() - begun, " ".join(str(error).split())[:200]
            if waited >= patience_s:
                raise StorageError(
                    f"{what} could not be {done} for {waited:.0f} s ({reason}): {mend}"
                    + (f", or raise {knob}={patience_s:g}" if knob else "")
                ) from error
            if not refused:
                print(f"{what} cannot be {done} ({reason}), trying again for {patience_s:g} s", file=sys.stderr)
            refused = True
            time.sleep(min(pause, max(0.0, patience_s - waited)))
            pause = min(2 * pause, 5.0)
        else:
            if refused:
                print(f"{what} is {done}, after {time.monotonic() - begun:.0f} s", file=sys.stderr)
            return result


def remove(path: str) -> None:
    """A file or folder and all in it, if it is there."""
    fs, plain = fsspec.core.url_to_fs(path)
    if fs.exists(plain):
        fs.rm(plain, recursive=True)


def folders(path: str, prefix: str) -> list[str]:
    """Names, sorted, of the folders in the folder `path` that begin with `prefix`; none if it is not there."""
    fs, plain = fsspec.core.url_to_fs(path)
    fs.invalidate_cache()
    try:
        if fs.info(plain)["type"] != "directory":
            raise NotADirectoryError(f"{path} is not a folder")
    except FileNotFoundError:
        return []
    entries = [e for e in fs.ls(plain, detail=True) if e["type"] == "directory"]
    names = (e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries)
    return sorted(n for n in names if n.startswith(prefix))


def files(path: str, pattern: str) -> list[str]:
    """Paths, sorted, of what is called like `pattern` in the folder `path`; none if it is not there."""
    fs, plain = fsspec.core.url_to_fs(path)
    return sorted(fs.glob(f"{plain.rstrip('/')}/{pattern}"))


@contextmanager
def local_folder(path: str) -> Iterator[Path]:
    """A folder where it is, or a copy of it for as long as the block lasts where it is at a URL."""
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        fs, plain = fsspec.core.url_to_fs(path)
        fs.get(plain.rstrip("/") + "/", temporary, recursive=True)
        yield Path(temporary)


def get(path: str, local: Path) -> None:
    """Copy a file to a local place."""
    fs, plain = fsspec.core.url_to_fs(path)
    fs.get(plain, str(local))


@contextmanager
def local_copy(path: str, field: str) -> Iterator[Path]:
    """A file where it is, or a copy of it for as long as the block lasts where it is at a URL.

    Raises:
        ValueError: it is not there; `field` is the setting that names it.
    """
    if not exists(path):
        raise ValueError(f"{field}={path} does not exist: name the LoRA that jobs/tscd.py made")
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / path.rsplit("/", 1)[-1]
        get(path, local)
        yield local
