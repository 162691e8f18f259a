"""A run that is told to stop: SIGTERM, which `ray job stop` sends, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """Ray Train's, that leaves SIGINT to `stopping`: its own way is to kill the workers at once."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@contextmanager
def stopping(board: ray.actor.ActorHandle, patience_s: float) -> Iterator[None]:
    """For as long as the block lasts SIGTERM and SIGINT ask the workers to write a checkpoint and return; after `patience_s`,
    or at a second one, the process ends. Elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()
    timer = threading.Timer(patience_s, os._exit, (1,))
    timer.daemon = True

    def on_signal(number: int, *_: object) -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()
        board.ask_to_stop.remote()
        if number == signal.SIGINT:
            board.tell.remote("stopping after a checkpoint; Ctrl-C again ends at once")
        timer.start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
