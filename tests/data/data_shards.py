"""Small shards made by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

EMBEDDED = Path(__file__).parents[2] / "hypersd_ray" / "embedded" / "data"
WORDS = ("a", "red", "blue", "cat", "dog")


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A PNG of noise, size = (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def row(key: str, seed: int, **metadata: float) -> list[tuple[str, bytes]]:
    """img2dataset's three members of a row."""
    caption = " ".join(WORDS[(seed >> i) % len(WORDS)] for i in range(3))
    return [(f"{key}.png", png(seed)), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(metadata).encode())]


GOOD_KEYS = sorted(f"{s}-{i}" for s in range(5) for i in range(12) if (s, i) != (4, 0))
"""What conftest's `shards` hold, without the broken."""
