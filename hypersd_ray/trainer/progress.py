"""What the user sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column


@contextmanager
def stderr_held() -> Iterator[None]:
    """What this process writes to its standard error meanwhile, C++ libraries too, is shown only if it then fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run, as rank 0 tells it."""

    stage: int
    stages: int
    k: int | None
    step: int
    steps: int
    losses: dict[str, float]
    images_per_s: float
    data_wait: float
    """Share of the time spent waiting for data."""
    seconds_left: float

    def text(self) -> str:
        """For a log line, and beside the bar."""
        losses = " ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        stage = "" if self.k is None else f"stage {self.stage + 1}/{self.stages} k={self.k} "
        return (
            f"{stage}step {self.step}/{self.steps}  {losses}  "
            f"{self.images_per_s:.0f} images/s  data wait {self.data_wait:.1%}  {clock(self.seconds_left)} left"
        )


def encoding_lines(every_s: float = 10.0) -> Callable[[int, int, int], None]:
    """For `precompute`: a line now and then of how far the encoding before a training is."""
    said = -every_s

    def show(shards: int, of: int, rows: int) -> None:
        nonlocal said
        if shards == of or time.monotonic() - said >= every_s:
            print(f"encoding  shard {shards}/{of}  {rows} images", flush=True)
            said = time.monotonic()

    return show


def clock(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where rank 0 leaves its snapshots and the driver finds the latest, and where a worker says why it gave up."""

    def __init__(self) -> None:
        self.latest: Snapshot | None = None
        self.stopped: Exception | None = None
        self.found_finished = False
        self.asked = self.moving = False
        self.savers: set[int] = set()
        self.workers = 0
        self.left_at: str | None = None
        self.told: list[str] = []

    def post(self, snapshot: Snapshot) -> None:
        """Replace the latest."""
        self.latest = snapshot

    def read(self) -> tuple[Snapshot | None, list[str]]:
        """The latest, or None before the first step; what was told since the last call."""
        told, self.told = self.told, []
        return self.latest, told

    def find_finished(self) -> None:
        """The checkpoint that a worker started from has no step left."""
        self.found_finished = True

    def was_finished(self) -> bool:
        """Whether it had none."""
        return self.found_finished and self.latest is None  # not one killed at its very end, and started again

    def ask_to_stop(self) -> None:
        """The workers are to write a checkpoint and return."""
        self.asked = True

    def asked_for(self) -> tuple[bool, bool]:
        """Whether they are; whether they are to write one because their number will change."""
        return self.asked, self.moving

    def ask_to_save(self) -> None:
        """The workers are to write a checkpoint: others will go on from it."""
        self.moving, self.savers = True, set()

    def saved(self, rank: int, workers: int) -> None:
        """One of them has written its part of a checkpoint."""
        self.savers.add(rank)
        self.workers = workers

    def all_saved(self) -> bool:
        """Whether all have, since they were asked."""
        return bool(self.savers) and len(self.savers) == self.workers

    def save_no_more(self) -> None:
        """Those who were asked are gone."""
        self.moving = False

    def leave(self, checkpoint: str) -> None:
        """The workers stopped as asked, and left this."""
        self.left_at = checkpoint

    def left(self) -> str | None:
        """What they left when they stopped as asked."""
        return self.left_at

    def tell(self, line: str) -> None:
        """Something that the user should read."""
        self.told.append(line)

    def stop(self, reason: Exception) -> None:
        """The run must not go on or be started again; the first reason counts."""
        self.stopped = self.stopped or reason

    def stop_reason(self) -> Exception | None:
        """What the user is to be told, or None."""
        return self.stopped


def bar_of(**options: Any) -> Progress:
    """The bar, with its text beside it: on a narrow terminal the text takes several lines, none of it is cut."""
    text = TextColumn("{task.description}", table_column=Column(ratio=1, overflow="fold"))
    return Progress(BarColumn(bar_width=16), text, expand=True, **options)


def _watch(board: ray.actor.ActorHandle, stop: threading.Event, line_every_s: float) -> None:
    terminal = sys.stdout.isatty()
    with bar_of(disable=not terminal) as bar:
        task = bar.add_task("waiting for the workers", total=1)
        said, seen = 0.0, None
        while True:
            ended = stop.wait(0.5)
            snapshot, told = ray.get(board.read.remote())
            for line in told:
                if terminal:
                    bar.console.print(line, highlight=False)
                else:
                    print(line, flush=True)
            if snapshot is not None and snapshot != seen:
                if terminal:
                    bar.update(task, total=snapshot.steps, completed=snapshot.step, description=snapshot.text())
                elif ended or time.monotonic() - said >= line_every_s or snapshot.step == snapshot.steps:
                    print(snapshot.text(), flush=True)
                    said = time.monotonic()
                seen = snapshot
            if ended:
                return


def here() -> NodeAffinitySchedulingStrategy:
    """On this process's node and no other: what is there goes when the driver goes, and not with a worker's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def shown(board: ray.actor.ActorHandle, line_every_s: float = 10.0) -> Iterator[None]:
    """The user sees what is on `board` for as long as the block lasts."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(board, stop, line_every_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
