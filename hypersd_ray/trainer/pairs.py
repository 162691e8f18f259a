"""Pairs for regression (DMD): the noise x_T of a caption, and where the guided teacher's ODE ends from there.

A folder of pairs is a folder of latents (data/latents.py) whose latents are the ODE's end points; the noise is not
stored, it is a function of the seed in the marker and of the row's key. So the training stream reads pairs as it reads
latents, and a folder of pairs may be trained on as images too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.pairs import OdePairsConfig
from hypersd_ray.data import latents
from hypersd_ray.data.files import digest
from hypersd_ray.data.pipeline import Columns, by_window, precomputed_dataset
from hypersd_ray.data.plan import Window
from hypersd_ray.data.pools import actors
from hypersd_ray.data.precompute import fingerprint, resolve, validate
from hypersd_ray.data.sources import find_shards
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.roles import Plain
from hypersd_ray.training import samples


@dataclass(frozen=True)
class Solved:
    """What `make_pairs` did."""

    out: str
    files: int
    files_skipped: int
    rows: int


class TeacherODE:
    """For `map_batches`: rows of encoded captions -> the same rows, their latents replaced by the ODE's end points."""

    def __init__(self, config: dict[str, Any]):
        self.config = OdePairsConfig.model_validate(config)
        self.device = "cuda" if self.config.data.encoder.num_gpus else "cpu"
        info = read_base(self.config.teacher)
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self.roles = Plain(load_unet(info, dtype, self.device), info.schedule, info.parameterization)
        self.null = load_encoders(self.config.teacher, vae=False).null_conditioning().to(self.device)

    def __call__(self, batch: Columns) -> Columns:
        def part(name: str) -> torch.Tensor:
            return torch.from_numpy(np.array(batch[name], dtype=np.float32)).to(self.device)

        pooled, time_ids = (part(name) if name in batch else None for name in ("pooled", "time_ids"))
        cond = Conditioning(part("prompt_embeds"), pooled, time_ids)
        keys, shape = [str(key) for key in batch["key"]], tuple(np.asarray(batch["latents"]).shape[1:])
        x_T = samples.start_noise(self.config.seed, keys, shape).to(self.device)
        x0 = samples.teacher_samples(self.roles, x_T, cond, self.null, self.config.steps, self.config.omega)
        return batch | {"latents": x0.half().cpu().numpy()}


def check(config: OdePairsConfig) -> dict[str, Any]:
    """What can be known before Ray starts: how the pairs are made, as their marker says.

    Raises:
        ConfigError, ValueError: captions or a teacher that are not there, or an `out` that holds something else; one line.
    """
    read_base(config.teacher)
    out = config.out.rstrip("/")
    made = {"seed": config.seed, "steps": config.steps, "omega": config.omega, "unet": unet_fingerprint(config.teacher)}
    latents.check_marker(out, {"pairs": made})
    if find_shards(config.data.patterns, config.data.format).format == "latents":
        resolve(config.data, config.teacher, out)  # makes nothing here
    else:
        validate(config.data, config.teacher, f"{out}/captions")
    return made


def make_pairs(config: OdePairsConfig, progress: Callable[[int, int, int], None] | None = None) -> Solved:
    """Solve the ODE for every caption; one file per file of encoded captions, and files that are whole are kept.

    `progress(files done, files in all, rows written)`. Raises: as `check`.
    """
    out, made = config.out.rstrip("/"), check(config)
    data = config.data.model_copy(update={"cache": "disk"})
    urls = resolve(data, config.teacher, out + "/captions" if data.format != "latents" else out).urls
    filesystem, root = fsspec.core.url_to_fs(out)
    filesystem.makedirs(root, exist_ok=True)
    counts: dict[str, int] = {}
    for url in urls:
        path = f"{root}/{_name(url)}"
        if filesystem.exists(path):
            with filesystem.open(path, "rb") as file:
                counts[_name(url)] = pq.ParquetFile(file).metadata.num_rows
    todo, skipped = [url for url in urls if _name(url) not in counts], len(counts)
    marker = {
        "model": str(Path(config.teacher).resolve()), "model_hash": fingerprint(config.teacher),
        "resolution": data.resolution, "filters": data.filters.model_dump(), "pairs": made,
    }  # fmt: skip
    latents.write_marker(filesystem, root, marker | {"complete": False, "files": counts})
    rows = 0
    for url, pieces in _solved(config, todo) if todo else ():
        counts[_name(url)] = _write(filesystem, f"{root}/{_name(url)}", pieces)
        rows += counts[_name(url)]
        if progress is not None:
            progress(len(counts), len(urls), rows)
    latents.write_marker(filesystem, root, marker | {"complete": True, "files": counts, "rows": sum(counts.values())})
    return Solved(config.out, len(counts), skipped, rows)


def pair_folder(folder: str, teacher: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(the folder's files, how its pairs were made).

    Raises:
        ConfigError: it holds no pairs, not all of them, or another teacher's.
    """
    folder = folder.rstrip("/")
    marker = latents.check_marker(folder, {})
    if not marker or "pairs" not in marker:
        raise ConfigError(f"regression.pairs={folder} holds no pairs: make them with jobs/pairs.py")
    if not marker["complete"]:
        raise ConfigError(f"regression.pairs={folder} is not complete: run jobs/pairs.py on it again")
    if marker["pairs"]["unet"] != unet_fingerprint(teacher) or marker["model_hash"] != fingerprint(teacher):
        raise ConfigError(
            f"regression.pairs={folder} was made by {marker['model']}, not by teacher={teacher}: make new ones"
        )
    return tuple(f"{folder}/{name}" for name in sorted(marker["files"])), marker["pairs"]


def unet_fingerprint(model_path: str) -> str:
    """A hash of the UNet's config, and of its weights by name, size and last MiB. Not of the path."""
    root = Path(model_path) / "unet"
    return digest(root, sorted(root.glob("*")))


def _solved(config: OdePairsConfig, urls: Sequence[str]) -> Iterator[tuple[str, Iterator[Columns]]]:
    """(file, its rows piece by piece), one Ray Data execution for all; a file without rows is passed over."""
    pool = config.data.encoder
    dataset = precomputed_dataset([Window(i, (url,)) for i, url in enumerate(urls)], config.data).map_batches(
        TeacherODE,
        fn_constructor_kwargs={"config": config.model_dump() | {"teacher": str(Path(config.teacher).resolve())}},
        batch_size=pool.batch_size,
        **actors(pool),
    )

    for index, pieces in by_window(dataset):
        yield urls[index], pieces


def _write(filesystem: Any, path: str, pieces: Iterator[Columns]) -> int:
    """One file, whole or not at all; -> its rows."""
    tables = (latents.table([piece]) for piece in pieces)
    first = next(tables)  # a file without rows is passed over
    with latents.open_file(filesystem, path, first.schema) as writer:
        return latents.add(writer, itertools.chain([first], tables))


def _name(url: str) -> str:
    return url.rpartition("/")[2]
