"""How a sweep's trials, which run in other processes, are told to stop."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import ray

from hypersd_ray.trainer.progress import here
from hypersd_ray.trainer.stopping import LOOK_S, signals


@ray.remote(num_cpus=0)
class StopSign:
    """Tells runs that are not in the process that a signal reaches, and knows which of them have yet to stop."""

    QUIET_S = 10.0
    """One that has not looked for so long is not training any more."""

    def __init__(self) -> None:
        self.up = False
        self.looked: dict[str, float] = {}

    def put_up(self) -> None:
        """All are to stop."""
        self.up = True

    def look(self, run: str) -> bool:
        """`run` trains; whether it is to stop."""
        self.looked[run] = time.monotonic()
        return self.up

    def gone(self, run: str) -> None:
        """`run` does not train any more."""
        self.looked.pop(run, None)

    def training(self) -> list[str]:
        """Those that do."""
        return [run for run, when in self.looked.items() if time.monotonic() - when < self.QUIET_S]


def new_sign() -> ray.actor.ActorHandle:
    """On this process's node: it goes when that goes."""
    return StopSign.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]


@contextmanager
def stopping_all(sign: ray.actor.ActorHandle, patience_s: float, said: str) -> Iterator[None]:
    """For as long as the block lasts SIGTERM and SIGINT put `sign` up; once no run trains any more, or after `patience_s`,
    the process ends with the line `said`: what started the runs must not take them for finished. A second signal ends it at
    once. In another thread than the main one no signal comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending: list[threading.Thread] = []

    def end() -> None:
        try:
            _say("stopping after a checkpoint of each run; again ends at once", sys.stdout)
            until = time.monotonic() + patience_s
            time.sleep(3 * LOOK_S)  # by then all have looked
            while time.monotonic() < until and ray.get(sign.training.remote()):
                time.sleep(LOOK_S)
            _say(f"error: {said}", sys.stderr)
        finally:
            os._exit(1)

    def asked(number: int) -> None:
        sign.put_up.remote()
        ending.append(threading.Thread(target=end, daemon=True))
        ending[0].start()

    with signals(asked):
        yield
        for thread in ending:  # the last run ended as it was told: so does the process
            thread.join()


def _say(line: str, where: IO[str]) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more: Ctrl-C reached them too
        print(line, file=where, flush=True)
