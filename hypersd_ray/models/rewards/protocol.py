"""What every reward model is.

Shapes
    images   (B, 3, H, W) float in [0, 1]
    prompts  B strings
    scores   (B,) float32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class RewardModel(nn.Module):
    """A frozen score of images and prompts, differentiable to the pixels.

    Samples do not interact: score i depends on image i and prompt i only, so that the gradient of the sum is every
    sample's own gradient, and samples of several callers may share a batch.
    """

    convention: str = ""
    """Scale and preprocessing in words; printed beside each figure."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32. Raises ValueError when the counts differ."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


@dataclass(frozen=True, eq=False)
class Scored:
    """values (B,) float32; gradient (B, 3, H, W) float32, d values_i / d images_i, or None when it was not asked for."""

    values: Tensor
    gradient: Tensor | None


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless images are (B, 3, H, W) float with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be (B, 3, H, W) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: one prompt each")
