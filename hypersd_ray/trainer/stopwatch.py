"""Rates of a run while it goes."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from hypersd_ray.config.run import OptimConfig, rows_each


class Timed(Protocol):
    """What the configuration of a run says of its length."""

    @property
    def optim(self) -> OptimConfig:
        """Its batch."""

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Steps of each stage."""


class Stopwatch:
    """Rates over the latest steps, and the share of the time that went to waiting for data.

    Checkpoints and sample grids are pauses: they are in nobody's rate. The first steps of a process (compilation, the
    stream's start) are left out of the waiting share that is reported.
    """

    WARMUP = 5

    def __init__(self, config: Timed, world: int):
        self.config, self.steps_done, self.waited, self.total = config, 0, 0.0, 0.0
        self.images = world * rows_each(config.optim.batch, world, config.optim.accumulation)  # of a step
        self.recent: deque[tuple[float, float]] = deque(maxlen=50)
        self.wait = 0.0
        self.begun = time.perf_counter()

    def wait_begins(self) -> None:
        """The loop asks for a batch."""
        self._asked = time.perf_counter()

    def wait_ends(self) -> None:
        """It has one."""
        self.wait = time.perf_counter() - self._asked

    def step(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        elapsed, self.begun = now - self.begun, now
        self.steps_done += 1
        if self.steps_done > self.WARMUP:
            self.recent.append((elapsed, self.wait))
            self.total, self.waited = self.total + elapsed, self.waited + self.wait

    def pause(self) -> None:
        """What follows is not training."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Training goes on."""
        self.begun += time.perf_counter() - self._paused

    def global_step(self, stage: int, step: int) -> int:
        """Steps since the run's beginning, over all stages."""
        return sum(self.config.stage_steps[:stage]) + step

    def rates(self, stage: int, step: int) -> dict[str, float]:
        """images_per_s, data_wait (share) and seconds_left."""
        seconds = sum(s for s, _ in self.recent) / len(self.recent) if self.recent else 0.0
        left = sum(self.config.stage_steps) - self.global_step(stage, step)
        wait = sum(w for _, w in self.recent)
        return {
            "images_per_s": self.images / seconds if seconds else 0.0,
            "data_wait": wait / (seconds * len(self.recent)) if seconds else 0.0,
            "seconds_left": seconds * left,
        }

    def totals(self) -> dict[str, float]:
        """Over this process's life."""
        return {"data_wait_share": self.waited / self.total if self.total else 0.0, "train_seconds": self.total}
