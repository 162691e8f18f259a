"""Draw one training picture: one or two emoji on a plain or two-colour background, with its caption and exact masks."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_ray.embedded.catalogue import Emoji, open_rgba

COLOURS = {
    "white": (255, 255, 255), "black": (24, 24, 27), "grey": (150, 153, 160), "red": (214, 62, 62), "orange": (246, 150, 60),
    "yellow": (250, 222, 90), "green": (88, 176, 96), "teal": (62, 164, 164), "blue": (72, 120, 214), "sky": (150, 208, 246),
    "purple": (146, 96, 190), "pink": (248, 174, 200),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """One emoji in a picture: `mask` (H, W) bool, what of it is visible; `box` x, y, width, height in pixels."""

    emoji: Emoji
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """`image` (H, W, 3) uint8."""

    image: np.ndarray
    caption: str
    style: str
    background: tuple[str, ...]
    objects: tuple[Placed, ...]


@dataclass(frozen=True)
class Composition:
    """What a picture shows, without where: the unit that is held out for validation."""

    style: str
    emoji: tuple[Emoji, ...]
    background: tuple[str, ...]

    @property
    def caption(self) -> str:
        """For example "a twemoji panda and a twemoji pear on a pink and white background"."""
        things = " and ".join(f"a {self.style} {e.name}" for e in self.emoji)
        article = "an" if self.background[0][0] in "aeiou" else "a"
        return f"{things} on {article} {' and '.join(self.background)} background"

    @property
    def held_out(self) -> bool:
        """True for about one composition in ten, whatever the seed."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 26


def read_caption(caption: str) -> tuple[str, tuple[str, ...], str]:
    """Style, objects in alphabetical order, and background of what `Composition.caption` says.

    Raises:
        ValueError: it is no such caption.
    """
    found = re.fullmatch(r"a (\S+) (.+) on an? (.+) background", caption)
    if found is None:
        raise ValueError(f"{caption!r} is not a caption of the embedded world")
    style, things, background = found.groups()
    return style, tuple(sorted(things.split(f" and a {style} "))), background


def draw_composition(
    rng: np.random.Generator, objects: list[Emoji], styles: tuple[str, ...], pairs: float
) -> Composition:
    """A random composition; `pairs` is the share of pictures with two objects."""
    style = styles[rng.integers(len(styles))]
    usable = [e for e in objects if style in e.files]
    count = 2 if rng.random() < pairs else 1
    chosen = tuple(usable[i] for i in rng.choice(len(usable), count, replace=False))
    names = list(COLOURS)
    background = tuple(names[i] for i in rng.choice(len(names), 1 if rng.random() < 0.6 else 2, replace=False))
    return Composition(style, chosen, background)


@lru_cache(maxsize=4096)
def _rgba(path: Path) -> Image.Image:
    return open_rgba(path)


def _background(rng: np.random.Generator, names: tuple[str, ...], size: int) -> np.ndarray:
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = COLOURS[names[0]]
    if len(names) == 2:
        edge = int(rng.integers(size // 3, 2 * size // 3 + 1))
        if rng.random() < 0.5:
            canvas[edge:] = COLOURS[names[1]]
        else:
            canvas[:, edge:] = COLOURS[names[1]]
    return canvas


def _placement(rng: np.random.Generator, index: int, count: int, size: int) -> tuple[int, int, int]:
    """Longest side and top left corner: one object is 62-94% of the picture wide; two stand side by side."""
    if count == 1:
        side = int(rng.integers(round(0.62 * size), round(0.94 * size) + 1))
        return side, int(rng.integers(0, size - side + 1)), int(rng.integers(0, size - side + 1))
    side = int(rng.integers(round(0.42 * size), round(0.52 * size) + 1))
    half = size // 2
    left = int(np.clip(index * half + rng.integers(-1, 2), 0, size - side))
    return side, left, int(rng.integers(0, size - side + 1))


def draw_picture(rng: np.random.Generator, composition: Composition, size: int) -> Picture:
    """Draw `composition` at `size` x `size` pixels; place and scale come from `rng`.

    Raises:
        ValueError: an emoji has no picture in the composition's style.
    """
    canvas = _background(rng, composition.background, size)
    placed: list[Placed] = []
    for index, emoji in enumerate(composition.emoji):
        if composition.style not in emoji.files:
            raise ValueError(
                f"{emoji.name!r} has no picture in the style {composition.style!r}, only in {sorted(emoji.files)}"
            )
        side, left, top = _placement(rng, index, len(composition.emoji), size)
        source = _rgba(emoji.files[composition.style])
        scale = side / max(source.size)
        width, height = (max(1, round(length * scale)) for length in source.size)
        left, top = left + (side - width) // 2, top + (side - height) // 2
        # Premultiplied, so that the colour of invisible pixels does not bleed into the rim.
        rgba = np.asarray(source, np.float32)
        rgba = np.dstack([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3]]).clip(0, 255).round().astype(np.uint8)
        small = np.asarray(
            Image.merge(
                "RGBA", [Image.fromarray(rgba[..., c]).resize((width, height), Image.Resampling.BOX) for c in range(4)]
            ),
            np.float32,
        )
        alpha = small[..., 3:] / 255
        region = canvas[top : top + height, left : left + width]
        region *= 1 - alpha
        region += small[..., :3]
        mask = np.zeros((size, size), bool)
        mask[top : top + height, left : left + width] = alpha[..., 0] > 0.5
        placed = [Placed(p.emoji, p.mask & ~mask, p.box) for p in placed]
        placed.append(Placed(emoji, mask, (left, top, width, height)))
    image = canvas.round().clip(0, 255).astype(np.uint8)
    return Picture(image, composition.caption, composition.style, composition.background, tuple(placed))
