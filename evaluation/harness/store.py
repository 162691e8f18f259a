"""Pictures, latents and scores by cell and shard, local or at any fsspec URL. A file is there whole or not at all.

    {out}/cells/{cell key}/cell.json                       what the cell is
    {out}/cells/{cell key}/{shard}.tar                     pictures (webdataset: png, txt, json) and latents.npz
    {out}/cells/{cell key}/{shard}.{judge}.npz             one judge's values
    {out}/cells/{cell key}/{shard}.{judge}.failed          on which pictures it failed: it is asked again the next time
    {out}/cells/{cell key}/{measure}.{hash}.draws.npz      resamples of a measure of the whole set, see results.py
    {out}/cells/{cell key}/latency-{device}-{hash of the machine and threads}-{repeats}.json of the parts

A shard's name is a hash of its rows' keys, so that a longer list of prompts finds the pictures of a shorter one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from evaluation.harness.prompts import Row
from evaluation.harness.subjects import Cell
from hypersd_ray.config.base import RunError


def picture_name(key: str) -> str:
    """Of a row in a shard's tar."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def shard_name(rows: Sequence[Row]) -> str:
    """Of these rows."""
    return hashlib.sha256("\0".join(f"{r.key}\1{r.prompt}" for r in rows).encode()).hexdigest()[:16]


class Store:
    """The folder `out`."""

    def __init__(self, out: str):
        self.out = out if "://" in out else str(Path(out).expanduser().resolve())
        self.fs, self.root = fsspec.core.url_to_fs(self.out)
        self._listed: dict[str, set[str]] = {}

    def folder(self, cell: str) -> str:
        """Of a cell's key."""
        return f"{self.root}/cells/{cell}"

    def names(self, cell: str) -> set[str]:
        """Files of a cell, as they were when first asked."""
        if cell not in self._listed:
            folder = self.folder(cell)
            there = self.fs.ls(folder, detail=False, refresh=True) if self.fs.exists(folder) else []
            self._listed[cell] = {str(path).rsplit("/", 1)[-1] for path in there}
        return self._listed[cell]

    def forget(self) -> None:
        """Look again."""
        self._listed.clear()

    def write(self, cell: str, name: str, data: bytes) -> None:
        """A file of a cell.

        Raises:
            RunError: no space is left, or it cannot be written; one line.
        """
        path = f"{self.folder(cell)}/{name}"
        try:
            self.fs.makedirs(self.folder(cell), exist_ok=True)
            with self.fs.open(part_of(path), "wb") as file:
                file.write(data)
            self.fs.mv(part_of(path), path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "no space is left" if full else f"cannot be written ({error.strerror or error})"
            raise RunError(f"out={self.out}: {why}; what was done is kept, the same command goes on from it") from None

    def read(self, cell: str, name: str) -> bytes:
        """A file of a cell."""
        with self.fs.open(f"{self.folder(cell)}/{name}", "rb") as file:
            return file.read()

    def write_cell(self, cell: Cell) -> None:
        """What the cell is, for people; once."""
        if "cell.json" not in self.names(cell.key):
            self.write(cell.key, "cell.json", json.dumps(json.loads(cell.to_json()), indent=1).encode())
            self.names(cell.key).add("cell.json")

    def write_pictures(
        self, cell: Cell, rows: Sequence[Row], pictures: np.ndarray, latents: np.ndarray, about: dict[str, Any]
    ) -> None:
        """A shard: pictures uint8 (n, 3, H, W), latents (n, C, h, w)."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for row, picture in zip(rows, pictures, strict=True):
                png, name = io.BytesIO(), picture_name(row.key)
                Image.fromarray(picture.transpose(1, 2, 0)).save(png, "PNG")
                told = {"key": row.key, "prompt": row.prompt, "seed": cell.seed, "steps": cell.steps}
                _add(tar, f"{name}.png", png.getvalue())
                _add(tar, f"{name}.txt", row.prompt.encode())
                _add(tar, f"{name}.json", json.dumps(told).encode())
            array = io.BytesIO()
            np.savez(array, latents=latents.astype(np.float16), about=json.dumps(about))
            _add(tar, "latents.npz", array.getvalue())
        self.write(cell.key, f"{shard_name(rows)}.tar", data.getvalue())

    def members(self, cell: str, rows: Sequence[Row]) -> dict[str, bytes]:
        """Files of a shard's tar by name."""
        with tarfile.open(fileobj=io.BytesIO(self.read(cell, f"{shard_name(rows)}.tar"))) as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]

    def read_pictures(self, cell: str, rows: Sequence[Row]) -> np.ndarray:
        """uint8 (n, 3, H, W)."""
        members = self.members(cell, rows)
        opened = [Image.open(io.BytesIO(members[f"{picture_name(row.key)}.png"])) for row in rows]
        return np.stack([np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture in opened])

    def read_latents(self, cell: str, rows: Sequence[Row]) -> np.ndarray:
        """float32 (n, C, h, w)."""
        array = np.load(io.BytesIO(self.members(cell, rows)["latents.npz"]))
        return array["latents"].astype(np.float32)

    def write_values(
        self, cell: str, rows: Sequence[Row], judge: str, values: np.ndarray, failures: Sequence[str]
    ) -> None:
        """What a judge says of a shard's pictures: (n, ...) float32, NaN where it failed, and why it did."""
        data = io.BytesIO()
        np.savez_compressed(data, values=values.astype(np.float32), failures=json.dumps(list(failures)))
        self.write(cell, f"{shard_name(rows)}.{judge}.npz", data.getvalue())
        failed = f"{shard_name(rows)}.{judge}.failed"
        if failures:
            self.write(cell, failed, json.dumps(list(failures), indent=1).encode())
        elif self.fs.exists(f"{self.folder(cell)}/{failed}"):
            self.fs.rm(f"{self.folder(cell)}/{failed}")

    def read_values(self, cell: str, rows: Sequence[Row], judge: str) -> tuple[np.ndarray, list[str]]:
        """The inverse."""
        array = np.load(io.BytesIO(self.read(cell, f"{shard_name(rows)}.{judge}.npz")))
        return array["values"], json.loads(str(array["failures"]))


def part_of(path: str) -> str:
    """What a file is called while this process writes it: evaluations may share a store."""
    return f"{path}.{socket.gethostname()}-{os.getpid()}.part"


def shards_of(rows: Sequence[Row], per_shard: int) -> list[list[Row]]:
    """Rows of each file."""
    return [list(rows[i : i + per_shard]) for i in range(0, len(rows), per_shard)]


def shard_of(rows: Sequence[Row], per_shard: int, key: str) -> tuple[str, list[Row]]:
    """The name of the file that holds a row, and its rows."""
    part = next(p for p in shards_of(rows, per_shard) if any(row.key == key for row in p))
    return shard_name(part), part


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
