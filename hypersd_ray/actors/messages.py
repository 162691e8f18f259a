"""What travels through the object store: numpy only, because Ray maps it without a copy (torch is ten times slower).

Shapes
    images     (B, 3, H, W) float16 in [0, 1]
    values     (B,) float32
    direction  (B, 3, H, W) float16, gradient / scale
    scale      (B,) float32, the gradient's greatest element
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from hypersd_ray.models.rewards.protocol import Scored


@dataclass(frozen=True, eq=False)
class Answer:
    """Scores of a call and, when asked, their gradient."""

    values: np.ndarray
    direction: np.ndarray | None
    scale: np.ndarray | None

    def part(self, start: int, end: int) -> Answer:
        """The rows of one caller."""
        cut = [None if a is None else a[start:end] for a in (self.direction, self.scale)]
        return Answer(self.values[start:end], *cut)


def join(answers: Sequence[Answer]) -> Answer:
    """Answers one after another as one."""
    if len(answers) == 1:
        return answers[0]
    gradient = answers[0].direction is not None
    return Answer(
        np.concatenate([a.values for a in answers]),
        np.concatenate([a.direction for a in answers]) if gradient else None,
        np.concatenate([a.scale for a in answers]) if gradient else None,
    )


def to_answer(scored: Scored) -> Answer:
    """To numpy. A pixel's gradient may be 1e-7, below float16's range: each sample is scaled to 1 first."""
    values = scored.values.cpu().numpy()
    if scored.gradient is None:
        return Answer(values, None, None)
    scale = scored.gradient.abs().flatten(1).amax(1)
    direction = scored.gradient / scale.clamp(min=1e-30).view(-1, 1, 1, 1)
    return Answer(values, direction.half().cpu().numpy(), scale.cpu().numpy())


def gradient_of(answer: Answer, like: Tensor) -> Tensor:
    """The gradient in float32 on `like`'s device."""
    import torch

    assert answer.direction is not None and answer.scale is not None
    # Arrays out of the object store are read-only, which torch warns of; they are read only.
    direction = torch.from_numpy(np.array(answer.direction)).to(like.device).float()
    return direction * torch.from_numpy(np.array(answer.scale)).to(like.device).view(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class PackedInstances:
    """An annotation with eight mask pixels a byte."""

    bits: np.ndarray
    shape: tuple[int, int, int]
    labels: np.ndarray


def pack(told: Sequence[Any]) -> list[Any]:
    """Prompts as they are, annotations packed, real pictures as float16 arrays."""
    from hypersd_ray.models.perception.protocol import Instances

    packed: list[Any] = []
    for entry in told:
        if isinstance(entry, Instances):
            masks = entry.masks.cpu().numpy()
            packed.append(PackedInstances(np.packbits(masks), masks.shape, entry.labels.cpu().numpy()))
        else:
            packed.append(entry if isinstance(entry, str) else entry.half().cpu().numpy())
    return packed


def unpack(packed: Sequence[Any]) -> list[Any]:
    """The inverse of `pack`."""
    import torch

    from hypersd_ray.models.perception.protocol import Instances

    told: list[Any] = []
    for entry in packed:
        if isinstance(entry, PackedInstances):
            count = int(np.prod(entry.shape))
            masks = np.unpackbits(entry.bits, count=count).reshape(entry.shape).astype(bool)
            told.append(Instances(torch.from_numpy(masks), torch.from_numpy(np.array(entry.labels))))
        else:
            told.append(entry if isinstance(entry, str) else torch.from_numpy(np.array(entry)).float())
    return told
