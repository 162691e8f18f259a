"""Write the embedded world as WebDataset shards (img2dataset's layout) and COCO-format annotations.

Picture `i` of a split depends on (seed, split, i) only: a longer build begins with the same pictures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from pycocotools import mask as coco_mask

from hypersd_ray.embedded.catalogue import OBJECT_GROUPS, Emoji
from hypersd_ray.embedded.compose import Picture, draw_composition, draw_picture

SPLITS = ("train", "val")


def pictures(
    objects: list[Emoji], split: str, count: int, size: int, styles: tuple[str, ...], pairs: float, seed: int
) -> Iterator[Picture]:
    """`count` pictures of `split`; the compositions of the two splits are disjoint (`Composition.held_out`)."""
    made = attempt = 0
    while made < count:
        rng = np.random.default_rng([seed, SPLITS.index(split), attempt])
        attempt += 1
        composition = draw_composition(rng, objects, styles, pairs)
        if composition.held_out == (split == "val"):
            made += 1
            yield draw_picture(rng, composition, size)


def _record(picture: Picture, key: str, image_id: int) -> dict:
    height, width = picture.image.shape[:2]
    return {
        "key": key,
        "image_id": image_id,
        "caption": picture.caption,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "style": picture.style,
        "background": list(picture.background),
        "objects": [{"name": p.emoji.name, "bbox": list(p.box)} for p in picture.objects],
    }


def _annotation(placed, annotation_id: int, image_id: int, category_id: int) -> dict:
    rle = coco_mask.encode(np.asfortranarray(placed.mask.astype(np.uint8)))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        "area": int(placed.mask.sum()),
        "bbox": [float(v) for v in coco_mask.toBbox(rle)],
        "iscrowd": 0,
        "object": placed.emoji.name,
    }


def write_split(out: Path, split: str, drawn: Iterator[Picture], per_shard: int, categories: list[str]) -> int:
    """Write `out/{split}-00000.tar`, ... and `out/{instances,captions}_{split}.json`; returns how many pictures."""
    out.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    instances: list[dict] = []
    captions: list[dict] = []
    writer: Any = None
    for index, picture in enumerate(drawn):
        if index % per_shard == 0:
            if writer is not None:
                writer.close()
            # A fixed time and owner: the same call makes the same bytes.
            writer = webdataset.TarWriter(
                str(out / f"{split}-{index // per_shard:05d}.tar"), mtime=0, user="root", group="root"
            )
        key = f"{split}{index:07d}"
        data = io.BytesIO()
        Image.fromarray(picture.image).save(data, "PNG", optimize=True)
        record = _record(picture, key, index)
        writer.write(
            {
                "__key__": key,
                "png": data.getvalue(),
                "txt": picture.caption,
                "json": json.dumps(record, separators=(",", ":")).encode(),
            }
        )
        images.append({"id": index, "file_name": f"{key}.png", "width": record["width"], "height": record["height"]})
        captions.append({"id": index, "image_id": index, "caption": picture.caption})
        for placed in picture.objects:
            if placed.mask.any():
                category = categories.index(placed.emoji.subgroup) + 1
                instances.append(_annotation(placed, len(instances) + 1, index, category))
    if writer is not None:
        writer.close()
    groups = [{"id": i + 1, "name": name} for i, name in enumerate(categories)]
    for name, rows in (("instances", instances), ("captions", captions)):
        document = {"images": images, "annotations": rows, "categories": groups if name == "instances" else []}
        (out / f"{name}_{split}.json").write_text(json.dumps(document, separators=(",", ":")))
    return len(images)


def write_objects(out: Path, objects: list[Emoji]) -> None:
    """`objects.json`: every object's name, category (of `OBJECT_GROUPS`), subgroup and code points."""
    rows = [{"name": e.name, "category": e.category, "subgroup": e.subgroup, "hexcode": e.hexcode} for e in objects]
    assert all(row["category"] in OBJECT_GROUPS for row in rows)
    (out / "objects.json").write_text(json.dumps(rows, indent=0))
