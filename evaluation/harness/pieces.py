"""The trainings of a comparison in its folder: what is done, and who is at what, so that several processes share one.

{out}/pieces/{piece}.json    done: its runs' folders, seconds, who serves which number of steps
{out}/pieces/{run}.seconds   what a run has taken, over the times it was stopped
{out}/pieces/{name}.claim    a process is at it: pid, host

The claim of a process that ended is taken over on its own host; where that host is gone too, a person removes the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypersd_ray.config.base import RunError

POLL_S = 5.0
"""Between two looks at what another process holds."""


@dataclass(frozen=True)
class Piece:
    """A training of a method: lr, seed, and the file that says it is done."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """As the run's."""
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"


def write_whole(path: Path, content: str | bytes) -> None:
    """A file that is there whole or not at all.

    Raises:
        RunError: it cannot be written; one line.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "no space is left" if full else f"cannot be written ({error.strerror or error})"
        raise RunError(f"{path}: {why}; what was done is kept, the same command goes on from it") from None


def write_json(path: Path, value: Any) -> None:
    """`value`, as `write_whole`."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """What a file holds; `default` where there is none.

    Raises:
        RunError: it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}): mend it, or remove it") from None


class Pieces:
    """The folder `{out}/pieces`."""

    def __init__(self, out: Path):
        self.folder = out / "pieces"

    def done(self, piece: Piece) -> dict[str, Any] | None:
        """What a finished piece left."""
        return read_json(self.folder / f"{piece.name}.json")

    def finish(self, piece: Piece, **about: Any) -> None:
        """Put a piece down as done."""
        write_json(self.folder / f"{piece.name}.json", asdict(piece) | about)

    def spent(self, run: str) -> float:
        """Seconds that a run has taken; chains that begin alike share one."""
        return float(read_json(self.folder / f"{run}.seconds", 0.0))

    @contextmanager
    def timed(self, run: str) -> Iterator[None]:
        """Add what the block takes, whatever becomes of it."""
        begun, before = time.perf_counter(), self.spent(run)
        try:
            yield
        finally:
            write_json(self.folder / f"{run}.seconds", before + time.perf_counter() - begun)

    # claims

    def _claim_path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who is at it: pid and host; None where nobody is, or a process of this host that has ended."""
        try:
            found = json.loads(self._claim_path(name).read_text())
        except (OSError, ValueError):  # none, or one whose process ended, or the disk, before it was written
            return None
        return found if found["host"] != socket.gethostname() or _lives(found["pid"], found["born"]) else None

    def claim(self, name: str) -> bool:
        """Take it. False where another process has it; the claim of an ended process of this host is taken over.

        Raises:
            RunError: the folder cannot be written.
        """
        path = self._claim_path(name)
        try:
            # Without the lock two could find one claim stale, and the second remove what the first has just made.
            with (self.folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists() and self.holder(name) is None:
                    path.unlink(missing_ok=True)
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                ours = {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}
                with os.fdopen(file, "w") as claim:
                    claim.write(json.dumps(ours) + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}): what was done is kept") from None
        return True

    def release(self, name: str) -> None:
        """Give it back."""
        self._claim_path(name).unlink(missing_ok=True)

    @contextmanager
    def held(self, name: str, log: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Have it for as long as the block lasts, after whoever has it now; `log` hears once whom it waits for."""
        waits = False
        while not self.claim(name):
            if not waits and (holder := self.holder(name)):
                log(f"waiting for {name}, which process {holder['pid']} of {holder['host']} has")
                waits = True
            time.sleep(POLL_S)
        try:
            yield
        finally:
            self.release(name)


def _born(pid: int) -> str:
    """When a process began, as the kernel counts: a number is given out again, the two together are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _lives(pid: int, born: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _born(pid) == born
