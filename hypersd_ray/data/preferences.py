"""Preference pairs out of files: which columns mean what, and an endless stream that resumes at any batch.

A picture stays as its encoded bytes until it is in a batch.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.preference import PreferencePairsConfig
from hypersd_ray.models.rewards.preprocess import Preprocess

PLAIN = {"prompt", "chosen", "rejected"}
PICK_A_PIC = {"caption", "jpg_0", "jpg_1", "label_0"}
IMAGE_REWARD_DB = {"prompt", "rank"}


@dataclass(frozen=True)
class Pair:
    """A prompt, the encoded picture that people preferred, and the other; a Path where the file names one."""

    prompt: str
    chosen: bytes | Path
    rejected: bytes | Path


def find_files(patterns: Sequence[str]) -> list[str]:
    """Sorted paths. Raises ConfigError for a pattern that matches nothing."""
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(pattern)
        if not matches:
            raise ConfigError(f"pairs: nothing matches {pattern}: name parquet, json or jsonl files")
        found.update(matches)
    return sorted(found)


def read_pairs(path: str) -> list[Pair]:
    """All pairs of one file. Ties are left out.

    Raises:
        ConfigError: the file cannot be read or its columns are none of those known.
    """
    rows = _rows(Path(path))
    columns = set(rows[0]) if rows else set()
    folder = Path(path).parent
    if columns >= PLAIN:
        return [Pair(r["prompt"], _picture(r["chosen"], folder), _picture(r["rejected"], folder)) for r in rows]
    if columns >= PICK_A_PIC:
        return _pick_a_pic(rows, folder)
    if columns >= IMAGE_REWARD_DB and columns & {"image", "image_path"}:
        return _ranked(rows, folder)
    raise ConfigError(
        f"pairs: {path} has the columns {', '.join(sorted(columns)) or 'none'}; known are (prompt, chosen, rejected), "
        "(caption, jpg_0, jpg_1, label_0) and (prompt, rank, image or image_path)"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"pairs: {path} cannot be read: {str(error).splitlines()[0]}") from None


def _picture(value: Any, folder: Path) -> bytes | Path:
    """Bytes, the hub's {"bytes": ..., "path": ...}, or a path relative to the file."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    return value if isinstance(value, bytes) else folder / value


def _pick_a_pic(rows: list[dict[str, Any]], folder: Path) -> list[Pair]:
    """label_0 is 1 where the first picture won, 0 where the second did, 0.5 for a tie."""
    pairs = []
    for row in rows:
        if row["label_0"] not in (0, 1) or not row.get("has_label", True):
            continue
        first, second = _picture(row["jpg_0"], folder), _picture(row["jpg_1"], folder)
        won, lost = (first, second) if row["label_0"] == 1 else (second, first)
        pairs.append(Pair(row["caption"], won, lost))
    return pairs


def _ranked(rows: list[dict[str, Any]], folder: Path) -> list[Pair]:
    """Every two pictures of a prompt whose ranks differ; rank 1 is the best."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("prompt_id", row["prompt"]), []).append(row)
    pairs = []
    for group in groups.values():
        for a, b in itertools.combinations(group, 2):
            if a["rank"] == b["rank"]:
                continue
            won, lost = (a, b) if a["rank"] < b["rank"] else (b, a)
            pictures = [_picture(r["image"] if "image" in r else r["image_path"], folder) for r in (won, lost)]
            pairs.append(Pair(won["prompt"], *pictures))
    return pairs


def is_held_out(prompt: str, share: float) -> bool:
    """By the prompt's hash: the same on every worker and in every run."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class PreferenceBatch:
    """chosen, rejected (B, 3, R, R) float in [0, 1]; prompts: B strings."""

    chosen: Tensor
    rejected: Tensor
    prompts: tuple[str, ...]

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """On `device`."""
        return PreferenceBatch(self.chosen.to(device), self.rejected.to(device), self.prompts)

    def chunks(self, parts: int) -> list[PreferenceBatch]:
        """`parts` equal micro-batches."""
        size = len(self.prompts) // parts
        return [
            PreferenceBatch(self.chosen[i : i + size], self.rejected[i : i + size], self.prompts[i : i + size])
            for i in range(0, size * parts, size)
        ]


def open_batch(pairs: Sequence[Pair], resolution: int) -> PreferenceBatch:
    """Decode, resize and crop. Raises ValueError for a picture that cannot be opened."""
    preprocess = Preprocess(resolution)

    def load(picture: bytes | Path) -> Tensor:
        try:
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                return preprocess.pil(image)
        except OSError as error:
            raise ValueError(f"pairs: a picture cannot be opened: {error}") from None

    sides = [torch.stack([load(getattr(p, side)) for p in pairs]) for side in ("chosen", "rejected")]
    return PreferenceBatch(sides[0], sides[1], tuple(p.prompt for p in pairs))


def held_out_pairs(config: PreferencePairsConfig, limit: int) -> list[Pair]:
    """The first `limit` held-out pairs. Raises ConfigError when there are none."""
    files = find_files(config.held_out or config.train)
    pairs: list[Pair] = []
    for path in files:
        pairs += [p for p in read_pairs(path) if config.held_out or is_held_out(p.prompt, config.held_out_share)]
        if len(pairs) >= limit:
            break
    if not pairs:
        raise ConfigError(f"pairs.held_out_share={config.held_out_share} sets no pair aside: raise it")
    return pairs[:limit]


@dataclass(frozen=True)
class Position:
    """Batches done in an epoch."""

    epoch: int = 0
    batch: int = 0


class PairStream:
    """An endless iterator of (batch, position after it) for one rank.

    The order is a function of (seed, epoch): files shuffled, pairs shuffled within a file, dealt to the ranks in turn.
    """

    def __init__(
        self,
        config: PreferencePairsConfig,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        position: Position = Position(),
    ):
        self.config, self.batch, self.rank, self.world, self.seed = config, batch, rank, world, seed
        self.files, self.position = find_files(config.train), position
        self._batches = self._run()

    def __iter__(self) -> PairStream:
        return self

    def __next__(self) -> tuple[PreferenceBatch, Position]:
        """The next batch. Raises ConfigError when an epoch has too few pairs for one."""
        return next(self._batches)

    def _pairs(self, epoch: int) -> Iterator[Pair]:
        rng = np.random.default_rng([self.seed, epoch])
        number = 0
        for index in rng.permutation(len(self.files)):
            pairs = read_pairs(self.files[index])
            if not self.config.held_out:
                pairs = [p for p in pairs if not is_held_out(p.prompt, self.config.held_out_share)]
            for i in rng.permutation(len(pairs)):
                if number % self.world == self.rank:
                    yield pairs[i]
                number += 1

    def _run(self) -> Iterator[tuple[PreferenceBatch, Position]]:
        epoch, skip = self.position.epoch, self.position.batch
        while True:
            pairs = self._pairs(epoch)
            made = skip
            for _ in range(skip * self.batch):
                next(pairs, None)
            while len(chosen := list(itertools.islice(pairs, self.batch))) == self.batch:
                made += 1
                yield open_batch(chosen, self.config.resolution), Position(epoch, made)
            if not made:
                raise ConfigError(
                    f"pairs: fewer than {self.batch} pairs a worker in an epoch: lower optim.batch or run.workers"
                )
            epoch, skip = epoch + 1, 0
