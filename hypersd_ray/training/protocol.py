"""What a worker's training state is to those around it: the loop steps it, a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hypersd_ray.models.roles import Roles
from hypersd_ray.training.progress import Progress


class Saved(Protocol):
    """The parts of a checkpoint; each tensor is read when it is asked for."""

    @property
    def folder(self) -> Path:
        """Where they lie."""

    def __call__(self, part: str) -> Mapping[str, Tensor]:
        """Its tensors by name. Raises LookupError when there is no such part."""


class Saveable(Protocol):
    """What writing a checkpoint asks of a state."""

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What training changes, weights and moments, by name: a file's worth at a time.

        All workers iterate together; where tensors are shared out, only rank 0 gets them.
        """

    def notes(self) -> dict[str, Any]:
        """What is no tensor, as JSON has it; under "progress", where the run is."""


class Checkpointed(Saveable, Protocol):
    """What a checkpoint asks of a state."""

    def load(self, saved: Saved, notes: dict[str, Any]) -> None:
        """Bring back what `parts` and `notes` gave. Raises ValueError when they are of another run."""


class Training(Checkpointed, Protocol):
    """What the loop asks of a state: `Distiller`, `OneStep`, `Feedback`."""

    roles: Roles
    progress: Progress

    @property
    def steps(self) -> int:
        """Of the present stage."""

    @property
    def finished(self) -> bool:
        """No stage is left."""

    @property
    def step(self) -> Callable[..., dict[str, Tensor]]:
        """One optimiser step on what the run's kind makes of a stream's rows; returns detached scalars."""

    def next_stage(self) -> None:
        """Go on to the next stage from this one's weights."""
