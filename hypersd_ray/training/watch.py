"""Reward hacking: a trained reward rises while every held-out one falls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypersd_ray.training.distributed import sum_over_workers

Scores = Mapping[str, Mapping[int, float]]
"""Reward -> number of the sampler's steps -> its mean over pictures that were made so."""


class Looks:
    """Scores of one step: of all its micro-batches, and of all workers once they are brought together."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device | str):
        """Args:
        lengths: all numbers of steps that there may be, the same on all workers.
        device: that of the workers' group.
        """
        self.lengths, self.device = lengths, device
        self.trained: dict[str, Tensor] = {}
        self.held_out: dict[str, Tensor] = {}

    def add(self, steps: int, trained: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> None:
        """The means over a micro-batch, whose pictures were made in `steps`."""
        for table, found in ((self.trained, trained), (self.held_out, held_out)):
            for name, value in found.items():
                row = table.setdefault(name, torch.zeros(len(self.lengths), 2, device=self.device))
                row[self.lengths.index(steps)] += torch.stack([value.detach().to(row), torch.ones_like(row[0, 0])])

    def together(self) -> tuple[Scores, Scores]:
        """The trained and the held-out rewards' means over all workers; every worker must call it."""
        for table in (self.trained, self.held_out):
            for name in sorted(table):
                sum_over_workers(table[name])
        return self._means(self.trained), self._means(self.held_out)

    def mean(self, name: str) -> Tensor:
        """Of a held-out reward, over all pictures: a scalar."""
        total, count = self.held_out[name].sum(0)
        return total / count

    def _means(self, table: Mapping[str, Tensor]) -> Scores:
        return {
            name: {n: total / count for n, (total, count) in zip(self.lengths, row.tolist(), strict=True) if count}
            for name, row in table.items()
        }


@dataclass
class HackingWatch:
    """Compares running means from one measurement to the next, of each number of steps with its own.

    Attributes:
        patience: measurements in a row after which `alarm` is true.
        smoothing: of the running means.
        means: by reward and number of steps.
        row: how many in a row by now.
        risen: the trained rewards that rose in the last measurement.
    """

    patience: int
    smoothing: float
    means: dict[str, float] = field(default_factory=dict)
    row: int = 0
    risen: tuple[str, ...] = ()

    @property
    def alarm(self) -> bool:
        """A trained one has risen and the held-out fallen for long."""
        return self.row >= self.patience

    def measure(self, trained: Scores, held_out: Scores) -> bool:
        """Take in one measurement; true when it makes the alarm begin."""
        moved = {name: self._moved(name, found) for name, found in {**trained, **held_out}.items()}
        if not held_out or all(by is None for by in moved.values()):
            return False
        self.risen = tuple(name for name in trained if (moved[name] or 0) > 0)
        falls = all((moved[name] or 0) < 0 for name in held_out)
        self.row = self.row + 1 if self.risen and falls else 0
        return self.row == self.patience

    def _moved(self, name: str, found: Mapping[int, float]) -> float | None:
        """How far the running means of a reward moved, over the numbers of steps; None for those seen first."""
        by = None
        for steps, value in found.items():
            key = f"{name} in {steps}"
            old = self.means.get(key)
            self.means[key] = value if old is None else self.smoothing * old + (1 - self.smoothing) * value
            if old is not None:
                by = (by or 0.0) + self.means[key] - old
        return by
