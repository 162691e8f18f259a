"""Pixels to files, with what made them written inside."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Format = Literal["png", "jpeg", "webp"]

PNG_KEY = "hypersd"
"""The PNG text chunk with the parameters as JSON; "parameters" beside it has them as A1111's tools read them."""
_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769


def encode(pixels: np.ndarray, kind: Format, quality: int, parameters: Mapping[str, Any] | None) -> bytes:
    """(H, W, 3) uint8 as a file; `parameters` go into PNG text, or Exif's UserComment as JSON. None is a bare preview."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    text = None if parameters is None else json.dumps(parameters, sort_keys=True)
    if kind == "png":
        info = PngInfo()
        if parameters is not None and text is not None:
            info.add_text(PNG_KEY, text)
            info.add_itxt("parameters", readable(parameters))
        image.save(out, "PNG", pnginfo=info, compress_level=4 if text else 1)
        return out.getvalue()
    exif = Image.Exif()
    if text is not None:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"ASCII\0\0\0" + text.encode()
    image.save(out, kind.upper(), quality=quality, exif=exif)
    return out.getvalue()


def readable(parameters: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, and `Key: value` pairs in one line."""
    names = {
        "num_inference_steps": "Steps",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "size": "Size",
        "model": "Model",
    }
    sampler = str(parameters.get("scheduler", "TCDScheduler")).removesuffix("Scheduler")
    pairs = [f"Sampler: {sampler}"] + [
        f"{label}: {parameters[name]}" for name, label in names.items() if name in parameters
    ]
    lora = parameters.get("lora") or {}
    if lora.get("name", "none") != "none":
        pairs.append(f"Lora: {lora['name']}:{lora['scale']:g}")
    lines = [str(parameters.get("prompt", "")).replace("\0", " ")]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}".replace("\0", " "))
    return "\n".join([*lines, ", ".join(pairs)])
