"""What a worker's training state is to those around it: the loop steps it, a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from hypersd_ray.models.roles import Roles
from hypersd_ray.training.distiller import Progress


class Checkpointed(Protocol):
    """What a checkpoint asks of a state."""

    def tensors(self) -> dict[str, Tensor]:
        """Every weight that training changes, by name."""

    def optimizer_state(self) -> dict[str, Any]:
        """Moments and, under "progress", where the run is: plain containers and tensors."""

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Bring back what `tensors` and `optimizer_state` gave. Raises ValueError when they are of another run."""


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
