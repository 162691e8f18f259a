"""A checkpoint folder: weights as safetensors, moments as a `weights_only` file, and a manifest that is written last.

Rank 0 writes the weights (they are the same on every worker); every rank writes its own data position.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hypersd_ray.training.protocol import Checkpointed


class DamagedCheckpoint(ValueError):
    """A checkpoint of which something is missing or not as it was written; one line says what."""


WEIGHTS, MOMENTS, MANIFEST = "weights.safetensors", "optimizers.pt", "manifest.json"


def save_checkpoint(folder: Path, training: Checkpointed, world_size: int = 1) -> None:
    """Write the weights, moments and manifest of a run of `world_size` workers into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = training.optimizer_state()
    save_file({name: t.contiguous().cpu() for name, t in training.tensors().items()}, folder / WEIGHTS)
    torch.save(state, folder / MOMENTS)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in (WEIGHTS, MOMENTS)
    }
    (folder / MANIFEST).write_text(
        json.dumps({"files": files, "progress": state["progress"], "world_size": world_size})
    )


def save_position(folder: Path, rank: int, world_size: int, position: dict) -> None:
    """Write where rank `rank` of `world_size` is in its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _position_name(rank, world_size)).write_text(json.dumps(position))


def load_position(folder: Path, rank: int, world_size: int) -> dict | None:
    """Where rank `rank` was; None when the checkpoint is of another world size (its share of the data is another).

    Raises:
        DamagedCheckpoint: the file is damaged, or missing though the checkpoint is of this world size.
    """
    path = folder / _position_name(rank, world_size)
    if not path.exists():
        manifest = folder / MANIFEST
        if manifest.exists() and json.loads(manifest.read_text()).get("world_size") == world_size:
            raise DamagedCheckpoint(f"{path} is missing; the checkpoint is damaged")
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is not JSON: {error}; the checkpoint is damaged") from None


def check_whole(folder: Path) -> None:
    """What was written is there, byte by byte.

    Raises:
        DamagedCheckpoint: it is not; one line says which file.
    """
    try:
        for name, written in json.loads((folder / MANIFEST).read_text())["files"].items():
            found = (folder / name).stat().st_size
            if found != written["size"]:
                raise ValueError(f"{name} has {found} bytes, {written['size']} were written: it is truncated")
            if _sha256(folder / name) != written["sha256"]:
                raise ValueError(f"{name} is damaged: its SHA-256 is not the one that was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{folder} is not a whole checkpoint of this run: {' '.join(str(error).split())}"
        ) from error


def load_checkpoint(folder: Path, training: Checkpointed) -> None:
    """Bring a run's state back.

    Raises:
        DamagedCheckpoint: the folder is incomplete or damaged.
        ValueError: it is of another configuration; one line says which.
    """
    check_whole(folder)
    try:
        training.load(load_file(folder / WEIGHTS), torch.load(folder / MOMENTS, weights_only=True))
    except Exception as error:  # what the readers raise is of every kind
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is not a whole checkpoint of this run: {reason}") from error


def _position_name(rank: int, world_size: int) -> str:
    """With the world size, so that a leftover of a run of another size is not taken for a part of this one."""
    return f"position-{rank:05d}-of-{world_size:05d}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
