"""Train the embedded world's SOLO on its exact instance masks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hypersd_ray.embedded.training import flip_some, train
from hypersd_ray.models.perception.coco import CocoAnnotations, mask_average_precision, to_results
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.perception.solo import SOLOConfig, SOLONetwork
from hypersd_ray.models.perception.solo_model import SOLO, load_solo, save_solo
from hypersd_ray.models.perception.solo_targets import training_loss


def solo_config(num_classes: int) -> SOLOConfig:
    """solo_r50_fpn, narrow and shallow, on pictures enlarged three times: 0.8M parameters.

    The enlarged objects are 35 to 90 px, all within the two fine levels (masks of 24 x 24); the coarse ones stay idle.
    """
    return SOLOConfig(
        num_classes=num_classes, blocks=(1, 1, 1, 1), width=16, fpn_channels=48, head_channels=48, stacked_convs=3,
        norm_groups=8, num_grids=(8, 6, 1, 1, 1), scale_ranges=((1, 56), (40, 4096), (8192, 8193), (8192, 8193), (8192, 8193)),
        short_side=96,
    )  # fmt: skip


def read_annotations(data: Path, split: str, count: int) -> list[Instances]:
    """The objects of the split's pictures, in their order (`load_pictures` has the same).

    Raises:
        ValueError: there are not `count` of them.
    """
    read = CocoAnnotations(data / f"instances_{split}.json")
    if len(read.images) != count:
        raise ValueError(f"{data}: {count} pictures in {split}-*.tar, {len(read.images)} annotated: build both anew")
    return [read.instances(key) for key in sorted(read.images)]


def train_solo(
    images: Tensor, targets: list[Instances], num_classes: int, out: Path, folder: Path, steps: int, batch: int = 16,
    seed: int = 0,
) -> SOLO:  # fmt: skip
    """Train on uint8 pictures (N, 3, 32, 32); writes `folder`."""
    torch.manual_seed(seed)
    model = SOLO(SOLONetwork(solo_config(num_classes))).train()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=generator)
        pictures, flipped = flip_some(images[index].float() / 255, generator)
        told = [targets[i] for i in index.tolist()]
        told = [Instances(t.masks.flip(-1), t.labels) if f else t for t, f in zip(told, flipped.tolist(), strict=True)]
        return training_loss(model.sums(pictures, told))

    train("solo", model, loss, steps, 2e-3, out, seed)
    save_solo(model.eval(), folder)
    return load_solo(folder)


def average_precision(model: SOLO, images: Tensor, data: Path, split: str = "val") -> dict[str, float]:
    """COCO's mask AP on a split's pictures."""
    path = data / f"instances_{split}.json"
    read = CocoAnnotations(path)
    ids = [c["id"] for c in read.categories]
    keys = sorted(read.images)[: len(images)]
    results: list[dict] = []
    for start in range(0, len(images), 64):
        found = model.predict(images[start : start + 64].float() / 255)
        for key, one in zip(keys[start : start + 64], found, strict=True):
            results += to_results(read.images[key]["id"], one, ids)
    return mask_average_precision(path, results, [read.images[key]["id"] for key in keys])
