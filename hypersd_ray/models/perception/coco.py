"""COCO 2017 instance annotations: polygons, RLE (compressed or not) and crowds; and the crop that the pictures get."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from hypersd_ray.models.perception.protocol import Instances, no_instances


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool of polygons [[x, y, ...], ...], an uncompressed or a compressed RLE.

    Raises:
        ValueError: it is none of these, or of another size.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [p for p in segmentation if len(p) >= 6]
            if not polygons:
                return np.zeros((height, width), bool)
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        elif isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, height, width)
        else:
            rle = segmentation
        mask = coco_mask.decode(rle).astype(bool)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"segmentation {str(segmentation)[:60]!r} is neither polygons nor RLE: {error}") from None
    if mask.shape != (height, width):
        raise ValueError(f"segmentation of size {mask.shape}, its image is {(height, width)}")
    return mask


class CocoAnnotations:
    """An `instances_*.json` by file name without suffix, which is the shards' key.

    Crowds (`iscrowd`: many objects under one mask) are left out: SOLO's and Mask2Former's losses know single objects.

    Raises:
        ValueError: the file is not in COCO's format.
    """

    def __init__(self, path: str | Path):
        try:
            content = json.loads(Path(path).read_text())
            self.images = {Path(i["file_name"]).stem: i for i in content["images"]}
            self.categories = sorted(content["categories"], key=lambda c: c["id"])
            by_image: dict[int, list[dict]] = defaultdict(list)
            for annotation in content["annotations"]:
                if not annotation.get("iscrowd", 0):
                    by_image[annotation["image_id"]].append(annotation)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a COCO instances file: {error!r}") from None
        self.by_image: Mapping[int, list[dict]] = by_image
        # COCO's ids run to 90 with gaps; networks count 0..79 in the ids' order.
        self.label_of = {category["id"]: i for i, category in enumerate(self.categories)}

    @property
    def num_classes(self) -> int:
        """How many categories."""
        return len(self.categories)

    def __contains__(self, key: str) -> bool:
        return key in self.images

    def instances(self, key: str) -> Instances:
        """The objects of the image `key` at its own size.

        Raises:
            ValueError: there is no such image.
        """
        if key not in self.images:
            raise ValueError(f"image {key!r} has no entry among the {len(self.images)} annotated images")
        image = self.images[key]
        height, width = image["height"], image["width"]
        rows = self.by_image.get(image["id"], [])
        if not rows:
            return no_instances(height, width)
        masks = np.stack([decode_segmentation(r["segmentation"], height, width) for r in rows])
        return Instances(torch.from_numpy(masks), torch.tensor([self.label_of[r["category_id"]] for r in rows]))


def crop_square(instances: Instances, resolution: int, min_pixels: int = 1) -> Instances:
    """The annotation of the picture's square crop: the short side resized to `resolution`, the centre cropped.

    The same arithmetic as for the pictures (data/images.py); objects with fewer than `min_pixels` left are dropped.
    """
    height, width = instances.masks.shape[-2:]
    scale = resolution / min(width, height)
    resized = (max(resolution, round(height * scale)), max(resolution, round(width * scale)))
    if not len(instances):
        return no_instances(resolution, resolution)
    masks = instances.masks
    if resized != (height, width):
        shrinks = resized[0] < height
        masks = F.interpolate(masks[None].float(), size=resized, mode="bilinear", antialias=shrinks)[0] >= 0.5
    top, left = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
    masks = masks[:, top : top + resolution, left : left + resolution]
    keep = masks.sum((1, 2)) >= min_pixels
    return Instances(masks[keep], instances.labels[keep])


def to_results(image_id: int, found: Instances, category_ids: Sequence[int]) -> list[dict]:
    """Rows for pycocotools' `loadRes`, masks as RLE."""
    assert found.scores is not None
    rows = []
    for mask, label, score in zip(found.masks, found.labels.tolist(), found.scores.tolist(), strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        rows.append({"image_id": image_id, "category_id": category_ids[label], "segmentation": rle, "score": score})
    return rows


def mask_average_precision(annotation_file: str | Path, results: list[dict], image_ids: Sequence[int]) -> dict:
    """COCO's mask AP over `image_ids`: {"AP": ..., "AP50": ..., "AP75": ...}; all 0 for no results."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        run = COCOeval(truth, truth.loadRes(results), "segm")
        run.params.imgIds = list(image_ids)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(run.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}
