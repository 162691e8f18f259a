"""Reward hacking: the trained rewards rise while every held-out one falls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class HackingWatch:
    """Compares running means from one measurement to the next.

    Attributes:
        patience: measurements in a row after which `alarm` is true.
        smoothing: of the running means.
        row: how many in a row by now.
    """

    patience: int
    smoothing: float
    means: dict[str, float] = field(default_factory=dict)
    row: int = 0

    @property
    def alarm(self) -> bool:
        """The trained have risen and the held-out fallen for long."""
        return self.row >= self.patience

    def measure(self, trained: Mapping[str, float], held_out: Mapping[str, float]) -> bool:
        """Take in one measurement; true when it makes the alarm begin."""
        before = dict(self.means)
        for name, value in {**trained, **held_out}.items():
            old = self.means.get(name, value)
            self.means[name] = self.smoothing * old + (1 - self.smoothing) * value
        if not held_out or not before:
            return False
        rises = any(self.means[n] > before[n] for n in trained)
        falls = all(self.means[n] < before[n] for n in held_out)
        self.row = self.row + 1 if rises and falls else 0
        return self.row == self.patience
