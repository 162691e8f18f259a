"""What a study compares: folders of pictures, one a model, with the same file names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path

from PIL import Image

from hypersd_ray.config.base import ConfigError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Comparison:
    """Two models' pictures of one prompt; `a` comes before `b` in the order the models were given.

    Attributes:
        name: the pictures' file name without its suffix.
    """

    name: str
    a: str
    b: str


class Entries:
    """The pictures under comparison, and their captions (NAME.txt beside NAME.png, in the first folder that has it)."""

    def __init__(self, folders: dict[str, Path]):
        """Args:
            folders: by model, at least two.

        Raises:
            ConfigError: fewer than two models, a folder that is not there, no picture that all have.
        """
        if len(folders) < 2:
            raise ConfigError(
                f"--images: a study compares at least 2 models, got {len(folders)}; give name=folder twice"
            )
        self.pictures = {model: _pictures(model, folder) for model, folder in folders.items()}
        names = set.intersection(*(set(found) for found in self.pictures.values()))
        if not names:
            raise ConfigError(
                f"--images: no file name is in all of {', '.join(map(str, folders.values()))}; the pictures of one "
                "prompt must have one name"
            )
        self.names = sorted(names)
        self.left_out = {model: len(found) - len(names) for model, found in self.pictures.items()}
        self.captions = {name: _caption(name, folders.values()) for name in self.names}
        self.comparisons = [Comparison(name, a, b) for a, b in combinations(sorted(folders), 2) for name in self.names]
        self._known = set(self.comparisons)

    def __contains__(self, comparison: Comparison) -> bool:
        return comparison in self._known

    def hashes(self) -> dict[tuple[str, str], str]:
        """(model, name) -> sha256 of the file, of all that are compared."""
        return {
            (model, name): hashlib.sha256(found[name].read_bytes()).hexdigest()
            for model, found in self.pictures.items() for name in self.names
        }  # fmt: skip

    def picture(self, model: str, name: str) -> bytes:
        """The picture as PNG without metadata: a file's own may name the model."""
        out = BytesIO()
        with Image.open(self.pictures[model][name]) as image:
            plain = image.convert("RGB")
        plain.info.clear()
        plain.save(out, "PNG")
        return out.getvalue()


def read_folders(options: tuple[str, ...]) -> dict[str, Path]:
    """`name=folder` each.

    Raises:
        ConfigError: one is not of that form, or a name comes twice.
    """
    folders: dict[str, Path] = {}
    for option in options:
        name, sign, folder = option.partition("=")
        if not (name and sign and folder):
            raise ConfigError(f"--images {option!r}: write name=folder, as in hyper=runs/hyper/images")
        if name in folders:
            raise ConfigError(f"--images {option!r}: there are two models named {name!r}")
        folders[name] = Path(folder)
    return folders


def _pictures(model: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"--images {model}={folder}: there is no such folder")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}


def _caption(name: str, folders) -> str:
    for folder in folders:
        path = folder / f"{name}.txt"
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
    return ""
