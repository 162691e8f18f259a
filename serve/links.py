"""Images behind URLs: files with names that cannot be guessed, in a folder that stays within its size."""

from __future__ import annotations

import math
import re
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

EVERY = 5.0
"""Seconds between two walks of the folder, unless it is full."""
SUFFIXES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"^[A-Za-z0-9_-]{32}\.(png|jpeg|webp)$")


class Links:
    """The folder behind GET /images/NAME. Several replicas may share it."""

    def __init__(self, folder: str | None, seconds: int, max_bytes: int):
        self.folder = Path(folder or Path(tempfile.gettempdir()) / "hypersd-images")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.seconds, self.max_bytes = seconds, max_bytes
        self._looked = -math.inf  # when the folder was walked
        self._held = 0  # bytes in it then, and what was put since
        self._lock = threading.Lock()  # images are put on several threads

    def put(self, data: bytes, kind: str) -> str:
        """Keep `data`; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        part = self.folder / f".{name}"
        part.write_bytes(data)
        part.rename(self.folder / name)  # never seen half written
        with self._lock:
            self._held += len(data)
            if self._held > self.max_bytes or time.monotonic() - self._looked > EVERY:
                self.sweep()
        return name

    def get(self, name: str) -> bytes | None:
        """What was kept under `name`; None when there is no such image any more."""
        if not _NAME.match(name):
            return None
        try:
            path = self.folder / name
            return path.read_bytes() if time.time() - path.stat().st_mtime < self.seconds else None
        except OSError:
            return None

    def sweep(self) -> None:
        """Remove what is too old, and the oldest of what is too much; what is not of this class's making stays."""
        self._looked, files = time.monotonic(), []
        for path in self.folder.iterdir():
            if not _NAME.match(path.name.removeprefix(".")):
                continue
            with suppress(OSError):  # another replica may have been faster
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total, now = sum(size for _, size, _ in files), time.time()
        # well below the limit, or a full folder would be walked for every image
        goal = self.max_bytes if total <= self.max_bytes else 0.9 * self.max_bytes
        for written, size, path in sorted(files, key=lambda file: file[0]):
            if now - written < self.seconds and total <= goal:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        self._held = total
