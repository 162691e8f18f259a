"""The embedded world's pictures as tensors, read whole: they fit in memory."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def load_pictures(folder: Path, split: str) -> tuple[torch.Tensor, list[str]]:
    """All pictures of a split as uint8 (N, 3, H, W), and their captions.

    Raises:
        ValueError: there is no shard of that split in `folder`.
    """
    paths = sorted(folder.glob(f"{split}-*.tar"))
    if not paths:
        raise ValueError(f"no {split}-*.tar in {folder}: build them with jobs/build_emoji.py --out {folder}")
    images, captions = [], []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                data = content.read()
                if member.name.endswith(".png"):
                    images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
                elif member.name.endswith(".txt"):
                    captions.append(data.decode())
    assert len(images) == len(captions)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float -1..1, the VAE's range."""
    return images.float() / 127.5 - 1
