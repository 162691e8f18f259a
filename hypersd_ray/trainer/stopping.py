"""A run that is told to stop: SIGTERM, which `ray job stop` sends, and Ctrl-C; or by a sign, where another process hears those."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.train.torch import TorchTrainer

LOOK_S = 1.0
"""How often a run looks at the sign."""


class Trainer(TorchTrainer):
    """Ray Train's, that leaves SIGINT to `stopping`: its own way is to kill the workers at once."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@contextmanager
def stopping(
    board: ray.actor.ActorHandle,
    patience_s: float,
    sign: ray.actor.ActorHandle | None = None,
    run: str = "",
    folder: str = "",
) -> Iterator[None]:
    """For as long as the block lasts SIGTERM and SIGINT ask the workers to write a checkpoint into `folder` and return; after
    `patience_s`, with a line, or at a second one, the process ends. In another thread than the main one no signal comes: there `sign` asks
    the run called `run`, if there is one."""
    if threading.current_thread() is not threading.main_thread():
        with _looking(board, sign, run):
            yield
        return
    timer = threading.Timer(patience_s, _give_up, (patience_s, folder))
    timer.daemon = True

    def asked(number: int) -> None:
        board.ask_to_stop.remote()
        if number == signal.SIGINT:
            board.tell.remote("stopping after a checkpoint; Ctrl-C again ends at once")
        timer.start()

    with signals(asked):
        try:
            yield
        finally:
            timer.cancel()


def _give_up(patience_s: float, folder: str) -> None:
    """End this process, in which nothing else would: its main thread waits for the workers."""
    with contextlib.suppress(OSError):  # nobody reads any more
        print(
            f"error: no checkpoint within {patience_s:g} s of the signal: the same command goes on from the newest one in "
            f"{folder}; raise run.stop_patience_s={patience_s:g}",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


@contextmanager
def signals(asked: Callable[[int], None]) -> Iterator[None]:
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
                if ray.get(sign.look.remote(run)):
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
