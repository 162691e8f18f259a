"""Percentile bootstrap over prompts, and Student's t over trainings where there are several: how far a mean could be from
what other prompts and other seeds of the training would have given.

Shapes: values, a, b (n,) one number per prompt; of several trainings (S, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from hypersd_ray.training.randomness import generator_of

_CHUNK = 256
"""Resamples drawn at a time: bounds the memory, does not change the draws."""


def resampled_means(values: Tensor, resamples: int, seed: int, side: int = 0) -> Tensor:
    """(resamples,) means of (S, n): n prompts drawn anew with replacement, and what other trainings would have changed.

    The draws of prompts depend on (seed, n, resamples) only, those of trainings on `side` too: two models' draws are of
    the same prompts and of trainings of their own. One training is as `bootstrap_interval` has it.
    """
    values, (trainings, n) = values.double().cpu(), values.shape
    generator = generator_of(seed, "bootstrap", n, resamples)
    of_prompts, found = values.mean(0), []
    for first in range(0, resamples, _CHUNK):
        prompts = torch.randint(n, (min(_CHUNK, resamples - first), n), generator=generator)
        found.append(of_prompts[prompts].mean(1))
    of_trainings = generator_of(seed, "trainings", trainings, resamples, side)
    return torch.cat(found) + training_noise(values.mean(1), resamples, of_trainings)


def training_noise(means: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """(resamples,) draws of how far the mean over S trainings, `means` (S,), is from that over all: s / sqrt(S) times
    Student's t of S - 1 degrees, at its even quantiles in an order of the generator's. Zeros for one training.

    S drawn from S with replacement would hold the truth in 75% of cases where S = 3, not in 95%.
    """
    trainings = len(means)
    if trainings == 1:
        return torch.zeros(resamples, dtype=torch.float64)
    quantiles = torch.from_numpy(student_t.ppf((np.arange(resamples) + 0.5) / resamples, trainings - 1))
    spread = means.double().std(correction=1) / trainings**0.5
    return spread * quantiles[torch.randperm(resamples, generator=generator)]


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it; `f"{interval:+.2f}"` is `+1.20 [+1.00, +1.40]`."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def percentiles(mean: float, draws: Tensor, tail: float = 0.025) -> Interval:
    """`mean`, and what `tail` of its resamples (R,) are below and `tail` above."""
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return Interval(mean, low, high)


def resample_counts(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """(resamples, n) float64: how often each of n is in each draw of n with replacement. A resample's mean is then a
    product of matrices."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, ones)


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
    return percentiles(values.double().mean().item(), means, (1 - level) / 2)


def paired_means(a: Tensor, b: Tensor, resamples: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means of a and b (k, n), (resamples, k) each, over the same draws of their n prompts: for what is no mean of prompts
    itself but a function of such means.

    Raises:
        ValueError: a and b are not of one shape (k, n), or n is below 2.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise ValueError(f"paired means need one shape (k, n), n >= 2, got {tuple(a.shape)} and {tuple(b.shape)}")
    n = a.shape[1]
    times = resample_counts(n, resamples, generator_of(seed, "bootstrap", n, resamples))
    return times @ a.double().T / n, times @ b.double().T / n


def paired_difference(a: Tensor, b: Tensor, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """The interval of mean(a - b) with the prompts kept together: tighter than two intervals side by side.

    Raises:
        ValueError: as `bootstrap_interval`, or a and b are not of one shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired values need one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return bootstrap_interval(a.double() - b.double(), level, resamples, seed)
