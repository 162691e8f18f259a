"""Which emoji the embedded world holds: the npm packages' pictures joined with CLDR's names on their code points."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
"""The five categories of things; faces, people, symbols and flags stay out."""

COMMON_SUBGROUPS = (
    "animal-amphibian", "animal-bird", "animal-bug", "animal-mammal", "animal-marine", "animal-reptile",
    "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-sweet", "drink",
    "transport-ground", "transport-air", "transport-water", "sport", "musical-instrument", "clothing", "tool",
)  # fmt: skip
"""Subgroups whose emoji have a silhouette of their own at 32 pixels (no clock faces, no books alike but for colour)."""

STYLES = {
    "noto": ("emoji-datasource-google", "img/google/64", ".png"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64", ".png"),
    "fluent": ("@lobehub/fluent-emoji-3d", "assets", ".webp"),
}


@dataclass(frozen=True)
class Emoji:
    """One object: `files` maps a style's name to its picture."""

    name: str
    category: str
    subgroup: str
    hexcode: str
    version: float
    files: dict[str, Path]


def code_points(name: str) -> str:
    """The code points of a file name or hexcode without the variation selector FE0F, in lower case."""
    return "-".join(part for part in name.lower().split(".")[0].split("-") if part != "fe0f")


def load_catalogue(node_modules: Path) -> list[Emoji]:
    """Every object (857 of them) that stands in Noto and Twemoji, in CLDR's order.

    Args:
        node_modules: where npm installed the packages.

    Raises:
        ValueError: a package is missing.
    """
    pictures: dict[str, dict[str, Path]] = {}
    for style, (package, folder, suffix) in STYLES.items():
        root = node_modules / package / folder
        if not root.is_dir():
            raise ValueError(f"{root} does not exist: run 'npm install {package}' there, or point --node-modules at it")
        pictures[style] = {code_points(p.name): p for p in sorted(root.iterdir()) if p.suffix == suffix}
    data = node_modules / "emojibase-data"
    meta = json.loads((data / "meta" / "groups.json").read_text())
    found = []
    for entry in json.loads((data / "en" / "data.json").read_text()):
        group = meta["groups"].get(str(entry.get("group")))
        subgroup = meta["subgroups"].get(str(entry.get("subgroup")))
        code = code_points(entry["hexcode"])
        if group not in OBJECT_GROUPS or code not in pictures["noto"] or code not in pictures["twemoji"]:
            continue
        files = {style: by_code[code] for style, by_code in pictures.items() if code in by_code}
        name = entry["label"].lower().replace("’", "'")
        found.append(Emoji(name, group, subgroup, code, entry["version"], files))
    return found


def common_objects(catalogue: list[Emoji], per_subgroup: int = 12, max_version: float = 1.0) -> list[Emoji]:
    """The commoner objects: old emoji of `COMMON_SUBGROUPS`, at most `per_subgroup` of each, evenly spaced in CLDR's order."""
    kept = []
    for subgroup in COMMON_SUBGROUPS:
        members = [e for e in catalogue if e.subgroup == subgroup and e.version <= max_version]
        count = min(per_subgroup, len(members))
        kept += [members[i * len(members) // count] for i in range(count)]
    return kept


def open_rgba(path: Path) -> Image.Image:
    """The picture as RGBA, cropped to what is visible (some files are LA or P mode, with margins of their own)."""
    image = Image.open(path).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None:
        raise ValueError(f"{path} is empty: every pixel is transparent")
    return image.crop(box)
