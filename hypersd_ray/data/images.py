"""Encoded bytes -> a square RGB crop and SDXL's size conditioning.

Shapes
    pixels     (3, R, R) uint8
    time_ids   (6,) float32: original height, original width, crop top, crop left, target height, target width
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


def open_image(data: bytes) -> Image.Image:
    """Read the header; the pixels are decoded on first use. Raises what PIL raises on something else than an image."""
    return Image.open(io.BytesIO(data))


def crop_square(image: Image.Image, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize the short side to `resolution`, crop the centre -> (pixels, time_ids).

    time_ids are SDXL's micro-conditioning (its paper, Sec. 2.2): the size before resizing and where the crop starts in
    the resized image. Raises what PIL raises on a broken image.
    """
    rgb = _to_rgb(image)
    width, height = rgb.size
    scale = resolution / min(width, height)
    resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if resized != rgb.size:
        rgb = rgb.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
    rgb = rgb.crop((left, top, left + resolution, top + resolution))
    pixels = np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))
    return pixels, np.array([height, width, top, left, resolution, resolution], dtype=np.float32)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB; transparency is laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
