"""What a file is known by."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(*paths: str | Path) -> str:
    """Of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
