"""What ControlNets are told of a picture: canny edges, and scribbles; and how far two edge maps agree.

Shapes: pictures and maps uint8 (B, 3, H, W); a map is 255 on edges and 0 elsewhere, the same in its three channels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Hint = Literal["canny", "scribble"]
LOW, HIGH = 80, 160
"""Canny's thresholds, in grey levels."""


def edge_map(pictures: Tensor, kind: Hint) -> Tensor:
    """Thin edges ("canny"), or the coarse strokes of somebody who traces them ("scribble").

    Raises:
        ValueError: OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError:
        raise ValueError("edges need OpenCV: pip install 'hypersd-ray[control]'") from None
    maps = []
    for picture in pictures.permute(0, 2, 3, 1).cpu().numpy():
        grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
        if kind == "scribble":  # small things go, lines grow thick
            grey = cv2.GaussianBlur(grey, (0, 0), max(1.0, grey.shape[0] / 40))
        found = cv2.Canny(grey, LOW, HIGH) if kind == "canny" else cv2.Canny(grey, LOW // 2, HIGH // 2)
        if kind == "scribble":
            size = max(3, round(grey.shape[0] / 20))
            found = cv2.dilate(found, np.ones((size, size), np.uint8))
        maps.append(found)
    return torch.from_numpy(np.stack(maps))[:, None].expand(-1, 3, -1, -1).contiguous()


def edge_agreement(found: Tensor, wanted: Tensor, tolerance: int = 1) -> Tensor:
    """(B,) F1 of edges within `tolerance` pixels: harmonic mean of how much of `found` is wanted and of `wanted` found.

    1 where neither has an edge, 0 where one has none.
    """
    a, b = (x[:, :1].float() / 255 for x in (found, wanted))
    near = lambda x: torch.nn.functional.max_pool2d(x, 2 * tolerance + 1, 1, tolerance)
    count = lambda x: x.flatten(1).sum(1)
    right = count(a * near(b)) / count(a).clamp(min=1)
    covered = count(b * near(a)) / count(b).clamp(min=1)
    agreement = 2 * right * covered / (right + covered).clamp(min=1e-9)
    return torch.where((count(a) == 0) & (count(b) == 0), 1.0, agreement)
