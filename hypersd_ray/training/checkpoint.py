"""A checkpoint folder: weights as safetensors, moments as a `weights_only` file, and a manifest that is written last.

Rank 0 writes the weights (they are the same on every worker); every rank writes its own data position.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hypersd_ray.training.distiller import Distiller

WEIGHTS, MOMENTS, MANIFEST = "weights.safetensors", "optimizers.pt", "manifest.json"


def save_checkpoint(folder: Path, distiller: Distiller) -> None:
    """Write the weights, moments and manifest of a run into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in distiller.tensors().items()}, folder / WEIGHTS)
    torch.save(distiller.optimizer_state(), folder / MOMENTS)
    sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS, MOMENTS)}
    (folder / MANIFEST).write_text(json.dumps({"sizes": sizes, "progress": distiller.optimizer_state()["progress"]}))


def save_position(folder: Path, rank: int, position: dict) -> None:
    """Write where rank `rank` is in its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"position-{rank:05d}.json").write_text(json.dumps(position))


def load_position(folder: Path, rank: int, world_size: int) -> dict | None:
    """Where rank `rank` was; None when the checkpoint is of another world size (its share of the data is another)."""
    if len(list(folder.glob("position-*.json"))) != world_size:
        return None
    return json.loads((folder / f"position-{rank:05d}.json").read_text())


def load_checkpoint(folder: Path, distiller: Distiller) -> None:
    """Bring a run's state back.

    Raises:
        ValueError: the folder is incomplete or damaged, or of another configuration; one line says which.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, size in manifest["sizes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{folder / name} has {found} bytes, {size} were written: the checkpoint is truncated")
        distiller.load(load_file(folder / WEIGHTS), torch.load(folder / MOMENTS, weights_only=True))
    except (FileNotFoundError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a whole checkpoint of this run: {error}") from error
