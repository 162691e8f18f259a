"""Percentile bootstrap over prompts, and over trainings where there are several: how far a mean could be from what other
prompts and other seeds of the training would have given.

Shapes: values, a, b (n,) one number per prompt; of several trainings (S, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_ray.training.randomness import generator_of

_CHUNK = 256
"""Resamples drawn at a time: bounds the memory, does not change the draws."""


def resampled_means(values: Tensor, resamples: int, seed: int, side: int = 0) -> Tensor:
    """(resamples,) means of (S, n): each of S trainings drawn anew and n prompts drawn anew, with replacement.

    The draws of prompts depend on (seed, n, resamples) only, those of trainings on `side` too: two models' draws are of
    the same prompts and of trainings of their own. One training is as `bootstrap_interval` has it. S trainings drawn from S
    spread a little less than S new ones would (by (S - 1) / S in variance).
    """
    values, (trainings, n) = values.double().cpu(), values.shape
    generator = generator_of(seed, "bootstrap", n, resamples)
    of_trainings = generator_of(seed, "trainings", trainings, resamples, side)
    found = []
    for first in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - first)
        prompts = torch.randint(n, (size, n), generator=generator)
        each = torch.stack([one[prompts].mean(1) for one in values], dim=1)
        if trainings > 1:
            each = each.gather(1, torch.randint(trainings, (size, trainings), generator=of_trainings))
        found.append(each.mean(1))
    return torch.cat(found)


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Tensor, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """The mean of `values` (n,) and its percentile interval over `resamples` draws of n with replacement.

    The draws depend on (seed, n, resamples) only, so two calls give the same numbers.

    Raises:
        ValueError: fewer than 2 values, a value that is not finite, a level outside (0, 1).
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"a bootstrap needs at least 2 values in one dimension, got shape {tuple(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be within (0, 1)")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {len(values)} values are not finite")
    means = resampled_means(values[None], resamples, seed)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.double().mean().item(), low, high)


def paired_means(a: Tensor, b: Tensor, resamples: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means of a and b (k, n), (resamples, k) each, over the same draws of their n prompts: for what is no mean of prompts
    itself but a function of such means.

    Raises:
        ValueError: a and b are not of one shape (k, n), or n is below 2.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise ValueError(f"paired means need one shape (k, n), n >= 2, got {tuple(a.shape)} and {tuple(b.shape)}")
    n = a.shape[1]
    drawn = torch.randint(n, (resamples, n), generator=generator_of(seed, "bootstrap", n, resamples))
    # How often each prompt was drawn, so that a resample's mean is a product of matrices.
    times = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    return times @ a.double().T / n, times @ b.double().T / n


def paired_difference(a: Tensor, b: Tensor, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """The interval of mean(a - b) with the prompts kept together: tighter than two intervals side by side.

    Raises:
        ValueError: as `bootstrap_interval`, or a and b are not of one shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired values need one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return bootstrap_interval(a.double() - b.double(), level, resamples, seed)
