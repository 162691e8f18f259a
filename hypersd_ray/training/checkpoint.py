"""A checkpoint folder: each part of a state as safetensors, what is no tensor in a manifest that is written last.

Parts are whole whatever the weights were shared out over, so any number of workers goes on from them. Rank 0 writes them;
every rank writes its own data position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.training.protocol import Checkpointed, Saveable

MANIFEST = "manifest.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint of which something is missing or not as it was written; one line says what."""


def _file_name(part: str) -> str:
    return f"{part}.safetensors"


def save_checkpoint(folder: Path, training: Saveable, rank: int = 0, world_size: int = 1) -> None:
    """Write a run's parts and manifest into `folder`. All ranks call it, for shares are gathered; rank 0 writes."""
    files = {}
    for part, tensors in training.parts():
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _file_name(part)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    if rank == 0:
        written = {"files": files, "notes": training.notes(), "world_size": world_size}
        (folder / MANIFEST).write_text(json.dumps(written))


def save_position(folder: Path, rank: int, world_size: int, position: dict) -> None:
    """Write where rank `rank` of `world_size` is in its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _position_name(rank, world_size)).write_text(json.dumps(position))


def load_positions(folder: Path, rank: int, world_size: int) -> list[dict]:
    """Where rank `rank` was, alone; all former ranks' in their order when the checkpoint is of another world size; none
    when it has none.

    Raises:
        DamagedCheckpoint: a file is damaged or missing.
    """
    try:
        written = json.loads((folder / MANIFEST).read_text())["world_size"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # `check_whole` says what is wrong there
        return []
    ranks = [rank] if written == world_size else range(written)
    found = []
    for one in ranks:
        path = folder / _position_name(one, written)
        try:
            found.append(json.loads(path.read_text()))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing; the checkpoint is damaged") from None
        except ValueError as error:
            raise DamagedCheckpoint(f"{path} is not JSON: {error}; the checkpoint is damaged") from None
    return found


def check_whole(folder: Path) -> dict[str, Any]:
    """What was written is there, byte by byte; returns the manifest.

    Raises:
        DamagedCheckpoint: it is not; one line says which file.
        OSError: storage refuses to read it, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, written in manifest["files"].items():
            found = (folder / name).stat().st_size
            if found != written["size"]:
                raise ValueError(f"{name} has {found} bytes, {written['size']} were written: it is truncated")
            if sha256_of(folder / name) != written["sha256"]:
                raise ValueError(f"{name} is damaged: its SHA-256 is not the one that was written")
        return manifest
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{folder} is not a whole checkpoint of this run: {' '.join(str(error).split())}"
        ) from error


def load_checkpoint(folder: Path, training: Checkpointed, manifest: dict[str, Any] | None = None) -> None:
    """Bring a run's state back; all ranks call it. `manifest`: what `check_whole` has returned of it, if it was asked already.

    Raises:
        DamagedCheckpoint: the folder is incomplete or damaged.
        ValueError: it is of another configuration; one line says which.
        OSError: storage refuses to read it.
    """
    manifest = check_whole(folder) if manifest is None else manifest
    try:
        training.load(Parts(folder, manifest["files"]), manifest["notes"])
    except Exception as error:  # what the readers raise at a damaged file is of every kind
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is not a whole checkpoint of this run: {reason}") from error


class Parts:
    """What a training state is loaded from."""

    def __init__(self, folder: Path, files: Mapping[str, object]):
        self.folder, self.files = folder, files

    def __call__(self, part: str) -> Mapping[str, Tensor]:
        """Its tensors by name. Raises LookupError when there is no such part."""
        if _file_name(part) not in self.files:
            raise LookupError(f"{_file_name(part)} is missing, it is of another configuration")
        return Stored(self.folder / _file_name(part))


class Stored(Mapping[str, Tensor]):
    """A safetensors file of which a tensor is read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.file = safe_open(path, framework="pt")
        self.names = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _position_name(rank: int, world_size: int) -> str:
    """With the world size, so that a leftover of a run of another size is not taken for a part of this one."""
    return f"position-{rank:05d}-of-{world_size:05d}.json"
