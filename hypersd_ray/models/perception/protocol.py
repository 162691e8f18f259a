"""What every perception model is, and what it is told of a picture.

Shapes
    images      (B, 3, H, W) float in [0, 1]
    Instances   masks (N, H, W) bool, labels (N,) int64 from 0
    losses      (B,) float32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one picture. scores (N,) float for a prediction, None for an annotation."""

    masks: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or len(self.masks) != len(self.labels):
            raise ValueError(f"masks {tuple(self.masks.shape)} and labels {tuple(self.labels.shape)} do not pair")

    def __len__(self) -> int:
        return len(self.labels)

    def boxes(self) -> Tensor:
        """(N, 4) float: left, top, right, bottom, the last two exclusive; zeros for an empty mask."""
        rows, columns = self.masks.any(2), self.masks.any(1)
        height, width = self.masks.shape[-2:]
        top, bottom = rows.int().argmax(1), height - rows.flip(1).int().argmax(1)
        left, right = columns.int().argmax(1), width - columns.flip(1).int().argmax(1)
        boxes = torch.stack([left, top, right, bottom], 1).float()
        return torch.where(rows.any(1, keepdim=True), boxes, 0.0)

    def to(self, device: torch.device | str) -> Instances:
        """On `device`."""
        scores = None if self.scores is None else self.scores.to(device)
        return Instances(self.masks.to(device), self.labels.to(device), scores)

    def above(self, score: float) -> Instances:
        """The predictions of at least `score`, as an annotation."""
        assert self.scores is not None, "an annotation has no scores"
        keep = self.scores >= score
        return Instances(self.masks[keep], self.labels[keep])


def no_instances(height: int, width: int) -> Instances:
    """A picture without objects."""
    return Instances(torch.zeros(0, height, width, dtype=torch.bool), torch.zeros(0, dtype=torch.long))


class PerceptionModel(nn.Module):
    """A frozen instance segmentation network, differentiable to the pixels. Samples do not interact."""

    num_classes: int

    def loss(self, images: Tensor, targets: Sequence[Instances]) -> Tensor:
        """L_instance(m_I(x'_0), GT(x_0)) of Eq. 16, (B,); 0 for a picture without objects, and no gradient from it.

        Masks have the pictures' height and width. Raises ValueError when counts or sizes differ.
        """
        raise NotImplementedError

    def predict(self, images: Tensor) -> list[Instances]:
        """The objects found, best first, masks at the pictures' size."""
        raise NotImplementedError


def check_targets(images: Tensor, targets: Sequence[Instances], num_classes: int) -> None:
    """Raises ValueError unless there is one target for each image, of its size, with known classes."""
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images and {len(targets)} annotations: one each")
    for target in targets:
        if target.masks.shape[-2:] != images.shape[-2:]:
            size, picture = tuple(target.masks.shape[-2:]), tuple(images.shape[-2:])
            raise ValueError(f"annotation masks are {size}, the picture is {picture}: resize and crop them alike")
        if len(target) and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < num_classes:
            raise ValueError(f"labels {target.labels.tolist()} must lie in 0..{num_classes - 1}")
