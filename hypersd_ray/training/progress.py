"""Where a run is, and the learning rate there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypersd_ray.config.run import OptimConfig


@dataclass
class Progress:
    """Where a run is: `step` counts within `stage`; `skipped` are steps lost to NaN, `bad_in_a_row` the latest of them."""

    stage: int = 0
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0

    def count(self, finite: bool) -> None:
        """Whether the latest step's gradient was finite on all workers; else it was skipped."""
        self.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of `step` of a stage of `steps`: linear warm-up, then constant or a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
