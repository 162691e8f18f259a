"""What ControlNets are told of a picture: canny edges, and scribbles.

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
