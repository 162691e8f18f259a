"""Prompt sets: rows with a key that decides a picture's noise, whatever batch or worker makes it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.embedded import paths
from hypersd_ray.training.randomness import seed_of

COLUMNS = ("caption", "prompt", "Prompt", "text", "TEXT")
COCO_IMAGES = 5000


@dataclass(frozen=True)
class Row:
    """key: noise is a function of (seed, key)."""

    key: str
    prompt: str


def held_out_prompts(folder: Path, limit: int) -> list[str]:
    """The first `limit` distinct captions of `folder`'s val-*.tar, in the shards' order.

    Raises:
        ValueError: no shard is there, or it has fewer.
    """
    shards = sorted(folder.glob("val-*.tar"))
    captions: dict[str, None] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions.setdefault(tar.extractfile(member).read().decode().strip())  # type: ignore[union-attr]
    if len(captions) < limit:
        raise ValueError(
            f"--prompts {limit}: {folder}/val-*.tar has {len(captions)} distinct captions; ask for at most that"
        )
    return list(captions)[:limit]


def read_rows(config: EvaluateConfig, log: Callable[[str], None] = lambda _: None) -> list[Row]:
    """The prompts that `config` asks for, distinct by key.

    Raises:
        ConfigError: a file that is missing or not what it should be, or fewer than 2 prompts.
    """
    if config.prompts == "embedded":
        rows = [Row(p, p) for p in held_out_prompts(paths.DATA, config.limit or 512)]
    elif not config.prompts_file:
        wanted = {"coco5k": "the manifest of jobs/coco5k.py", "parti": "PartiPrompts.tsv", "file": "the file"}
        raise ConfigError(f"--prompts {config.prompts} needs --prompts-file: {wanted[config.prompts]}")
    else:
        rows = _read_file(config, log)
    distinct = list({row.key: row for row in rows}.values())
    if len(distinct) < len(rows):
        log(f"{config.prompts_file}: {len(rows) - len(distinct)} prompts are there twice, each is used once")
    if len(distinct) < 2:
        raise ConfigError(f"--prompts-file {config.prompts_file} has {len(distinct)} prompts: at least 2")
    return distinct[: config.limit]


def coco_images(config: EvaluateConfig) -> list[int]:
    """How many pictures coco5k's manifest is of, and the least and the greatest of their ids; empty for other prompts and
    where the manifest does not say."""
    if config.prompts != "coco5k":
        return []
    with fsspec.open(config.prompts_file, "rb") as file:
        table = pq.read_table(io.BytesIO(file.read()))
    ids = set(table["image_id"].to_pylist()) if "image_id" in table.column_names else set()
    return [len(ids), min(ids), max(ids)] if ids else []


def _read_file(config: EvaluateConfig, log: Callable[[str], None]) -> list[Row]:
    path = config.prompts_file
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--prompts-file {path} cannot be read: {' '.join(str(error).split())}") from None
    if config.prompts == "coco5k":
        table = _parquet(data, path, ("caption", "seed"))
        return [Row(str(seed), caption) for seed, caption in zip(table["seed"], table["caption"], strict=True)]
    if path.endswith(".parquet"):
        return _rows([str(value or "") for value in next(iter(_parquet(data, path, ()).values()))], path, log)
    text = _text(data, path)
    if config.prompts == "parti":
        reader = csv.DictReader(io.StringIO(text), delimiter="\t")
        if "Prompt" not in (reader.fieldnames or ()):
            raise ConfigError(
                f"--prompts-file {path} has no column Prompt: name PartiPrompts.tsv as its authors publish it"
            )
        return _rows([line["Prompt"] or "" for line in reader], path, log)
    return _rows(text.splitlines(), path, log)


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"--prompts-file {path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from None


def _parquet(data: bytes, path: str, wanted: tuple[str, ...]) -> dict[str, list[Any]]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"--prompts-file {path} is not a parquet file: {str(error).splitlines()[0]}") from None
    names = wanted or tuple(name for name in COLUMNS if name in table.column_names)[:1]
    if not names or not set(names) <= set(table.column_names):
        needs = " and ".join(wanted) or "caption"
        raise ConfigError(f"--prompts-file {path} has the columns {', '.join(table.column_names)}: it needs {needs}")
    return {name: table[name].to_pylist() for name in names}


def _rows(lines: list[str], path: str, log: Callable[[str], None]) -> list[Row]:
    prompts = [" ".join(line.split()) for line in lines]
    empty = sum(not p for p in prompts)
    if empty:
        log(f"{path}: {empty} empty lines are left out")
    return [Row(p, p) for p in prompts if p]


def selection_captions(count: int) -> list[str]:
    """The first distinct captions of the embedded training pictures that are not held out too."""
    held_out = _captions("val")
    found = [caption for caption in _captions("train") if caption not in set(held_out)]
    return found[:count]


def _captions(split: str) -> list[str]:
    rows = json.loads((paths.DATA / f"captions_{split}.json").read_text())["annotations"]
    return list(dict.fromkeys(row["caption"].strip() for row in rows))


def coco_manifest(annotations: Path, images: int = COCO_IMAGES) -> pa.Table:
    """One caption of each picture of COCO's `captions_val2017.json`, the one of the lowest id, in the order of image ids.

    Columns: image_id, caption_id, caption, caption_sha256, seed (of the noise: a hash of ids and caption), file_name.

    Raises:
        ConfigError: not COCO's captions, or not of as many pictures as `images` says (0: any number).
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        lowest: dict[int, tuple[int, str]] = {}
        for a in content["annotations"]:
            found = (int(a["id"]), " ".join(a["caption"].split()))
            lowest[a["image_id"]] = min(found, lowest.get(a["image_id"], found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--annotations {annotations} is not COCO's captions file: {reason}") from None
    if images and len(lowest) != images:
        raise ConfigError(
            f"--annotations {annotations} has captions of {len(lowest)} pictures, COCO2017-val has {images}: name "
            "captions_val2017.json, or set --images 0"
        )
    rows = []
    for image, (caption, text) in sorted(lowest.items()):
        digest = hashlib.sha256(text.encode()).hexdigest()
        rows.append({
            "image_id": image, "caption_id": caption, "caption": text, "caption_sha256": digest,
            "seed": seed_of("coco5k", image, caption, digest), "file_name": names.get(image, ""),
        })  # fmt: skip
    return pa.Table.from_pylist(rows)
