"""Recipes of comparisons of methods."""

from __future__ import annotations

from collections.abc import Callable

from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.ablations import ABLATIONS
from hypersd_ray.recipes.methods import BUDGET, METHODS


def compare_tiny() -> CompareConfig:
    """All methods on the embedded model: some 4 hours on 2 cores, by two processes."""
    return CompareConfig(
        teacher=str(paths.TEACHER), methods=tuple(METHODS), budget=BUDGET, noisy_steps=(4, 8),
        out="runs/compare-tiny",
    )  # fmt: skip


def ablations() -> CompareConfig:
    """TSCD on the embedded model, and with one part of it changed at a time: each once, at the same learning rate."""
    methods = ("tscd", *ABLATIONS)
    return CompareConfig(
        teacher=str(paths.TEACHER), methods=methods, budget=BUDGET, rates=(1.0,), seeds=(0,), baseline="tscd",
        out="runs/ablations",
    )  # fmt: skip


COMPARE_RECIPES: dict[str, Callable[..., CompareConfig]] = {"tiny": compare_tiny, "ablations": ablations}
TRAININGS = METHODS | ABLATIONS
"""What a comparison can train, by name."""
