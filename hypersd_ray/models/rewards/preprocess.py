"""CLIP-style preprocessing twice: on tensors with a gradient, for all rewards and metrics, and on PIL images as the references
do it, for the pictures of preference pairs.

Both resize with an antialiased bicubic kernel (PIL's). They differ by one grey level at most, because PIL rounds after
each of its two passes; a test holds them together.

Shapes
    images  (B, 3, H, W) float in [0, 1]
    result  (B, 3, size, size) float, normalised
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop", "pad"]
"""What of a picture that is not square: see `Preprocess`."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture of any size becomes the network's input.

    fit "crop": the short side is resized to `size`, the centre is cropped (CLIP, ImageReward, PickScore).
    fit "pad": the long side is resized to `size`, the rest is black (HPS v2).
    """

    size: int = 224
    fit: Fit = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, before the crop or the padding."""
        if self.fit == "crop":
            # torchvision's Resize: the long side is cut down to an integer
            short = min(height, width)
            return (
                (self.size, int(self.size * width / short))
                if height <= width
                else (int(self.size * height / short), self.size)
            )
        scale = self.size / max(height, width)
        return round(height * scale), round(width * scale)

    def __call__(self, images: Tensor) -> Tensor:
        """The differentiable form."""
        return self.normalise(self.place(images))

    def place(self, images: Tensor) -> Tensor:
        """Resized and cropped or padded, still in [0, 1]."""
        target = self.resized(*images.shape[-2:])
        if target != tuple(images.shape[-2:]):
            # Without antialias=True a smaller picture would be sampled, not averaged: scores drift from the references'.
            # The clamp is what PIL's bytes do to the kernel's overshoot.
            images = F.interpolate(images, size=target, mode="bicubic", antialias=True).clamp(0, 1)
        height, width = target
        if self.fit == "crop":
            top, left = round((height - self.size) / 2), round((width - self.size) / 2)
            return images[..., top : top + self.size, left : left + self.size]
        down, right = self.size - height, self.size - width
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))

    def normalise(self, images: Tensor) -> Tensor:
        """(x - mean) / std per channel."""
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def pil(self, image: Image.Image) -> Tensor:
        """One PIL image -> (3, size, size) in [0, 1]: the references' own way, without normalisation."""
        image = image.convert("RGB")
        height, width = self.resized(image.height, image.width)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.fit == "crop":
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            canvas = Image.new("RGB", (self.size, self.size))
            canvas.paste(image, ((self.size - width) // 2, (self.size - height) // 2))
            image = canvas
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
