"""One job at a time in a run's folder: two would write over each other's checkpoints."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TypeVar

import ray

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.run import RunConfig
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.progress import ProgressBoard, here

T = TypeVar("T")

NAMESPACE = "hypersd_ray"
"""Of Ray's names: each driver has one of its own else."""
LEAVING_S = 90.0
"""How long another job of the same run may take to end: as long as Ray lets a stopped one write its checkpoint."""


@contextmanager
def sole(run: RunConfig, folder: str) -> Iterator[ray.actor.ActorHandle]:
    """The board of the run in `folder`, for as long as the block lasts; no other job has it meanwhile.

    The board's name keeps out other jobs of this cluster; a lock on a local folder those of other clusters that reach it.

    Raises:
        ConfigError: another job trains that run, and does not end.
    """

    def board() -> ray.actor.ActorHandle | None:
        try:
            return ProgressBoard.options(  # type: ignore[attr-defined]
                name=f"run {folder}", namespace=NAMESPACE, scheduling_strategy=here()
            ).remote()
        except ValueError:  # the name is taken
            return None

    with ExitStack() as stack:
        if not storage.is_url(folder):
            stack.enter_context(_first(lambda: _locked(folder), run, folder))
        mine = _first(board, run, folder)
        stack.callback(ray.kill, mine)
        yield mine


def _locked(folder: str) -> IO[bytes] | None:
    path = Path(folder, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def _first(take: Callable[[], T | None], run: RunConfig, folder: str) -> T:
    """What `take` gives once it gives something."""
    begun, said = time.monotonic(), False
    while (taken := take()) is None:
        if time.monotonic() - begun > LEAVING_S:
            raise ConfigError(
                f"run.name={run.name}: another job trains the run in {folder}: stop it, or set run.name or run.out"
            )
        if not said:
            print(f"another job trains the run in {folder}: waiting for its end", flush=True)
            said = True
        time.sleep(1.0)
    return taken
