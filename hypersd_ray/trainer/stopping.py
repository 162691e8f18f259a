"""A run that is told to stop: SIGTERM, which `ray job stop` sends, and Ctrl-C; and the runs of a sweep, which one process is told for."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import ActorUnavailableError, RayError
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from hypersd_ray.trainer.progress import here

LOOK_S = 1.0
"""How often a run looks at the sign."""


class Trainer(TorchTrainer):
    """Ray Train's, that leaves SIGINT to `stopping`: its own way is to kill the workers at once."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@ray.remote(num_cpus=0)
class StopSign:
    """Tells runs that are not in the process that a signal reaches, and knows which of them have yet to stop."""

    QUIET_S = 10.0
    """One that has not looked for so long is not training any more."""

    def __init__(self) -> None:
        self.up = False
        self.looked: dict[str, float] = {}
        self.groups: dict[str, str] = {}

    def put_up(self) -> None:
        """All are to stop."""
        self.up = True

    def look(self, run: str, group: str | None) -> bool:
        """`run` trains, in the placement group `group`; whether it is to stop."""
        self.looked[run] = time.monotonic()
        if group is not None:
            self.groups[run] = group
        return self.up

    def group_of(self, run: str) -> str | None:
        """Where it trained last."""
        return self.groups.get(run)

    def gone(self, run: str) -> None:
        """`run` does not train any more."""
        self.looked.pop(run, None)

    def training(self) -> list[str]:
        """Those that do."""
        return [run for run, when in self.looked.items() if time.monotonic() - when < self.QUIET_S]


NAME = "stop-sign"
"""In this driver's namespace."""


def new_sign() -> ray.actor.ActorHandle:
    """On this process's node: it goes when that goes."""
    options = {"name": NAME, "get_if_exists": True, "scheduling_strategy": here()}
    return StopSign.options(**options).remote()  # type: ignore[attr-defined]


def free_places(run: str) -> None:
    """Give back the places of a run whose process was ended from outside. Ray Train leaves that to an actor which asks the
    dashboard whether the run is still alive: without a dashboard the places would never come back."""
    try:
        group = ray.get(ray.get_actor(NAME).group_of.remote(run))
    except (ValueError, RayError):  # no sign: nothing was started
        return
    if group is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


@contextmanager
def stopping(
    board: ray.actor.ActorHandle, patience_s: float, sign: ray.actor.ActorHandle | None = None, run: str = ""
) -> Iterator[None]:
    """For as long as the block lasts SIGTERM and SIGINT ask the workers to write a checkpoint and return; after `patience_s`,
    or at a second one, the process ends. In another thread than the main one no signal comes: there `sign` asks
    the run called `run`, if there is one."""
    if threading.current_thread() is not threading.main_thread():
        with _looking(board, sign, run):
            yield
        return
    timer = threading.Timer(patience_s, os._exit, (1,))
    timer.daemon = True

    def asked(number: int) -> None:
        board.ask_to_stop.remote()
        if number == signal.SIGINT:
            board.tell.remote("stopping after a checkpoint; Ctrl-C again ends at once")
        timer.start()

    with _signals(asked):
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def _signals(asked: Callable[[int], None]) -> Iterator[None]:
    """The first SIGTERM or SIGINT calls `asked`, the second ends the process."""
    told = threading.Event()

    def on_signal(number: int, *_: object) -> None:
        if told.is_set():
            os._exit(1)
        told.set()
        asked(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _looking(board: ray.actor.ActorHandle, sign: ray.actor.ActorHandle | None, run: str) -> Iterator[None]:
    if sign is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            try:
                if ray.get(sign.look.remote(run, ray.get(board.placement_group.remote()))):
                    board.ask_to_stop.remote()
            except ActorUnavailableError:  # for now
                continue
            except RayError:  # the process that has the sign is gone, and takes this one along
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        sign.gone.remote(run)


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

    with _signals(asked):
        yield
        for thread in ending:  # the last run ended as it was told: so does the process
            thread.join()


def _say(line: str, where: IO[str]) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more: Ctrl-C reached them too
        print(line, file=where, flush=True)
