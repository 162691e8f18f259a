"""Recipes of comparisons of methods."""

from __future__ import annotations

from collections.abc import Callable

from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.methods import BUDGET, METHODS


def compare_tiny() -> CompareConfig:
    """All methods on the embedded model: some 4 hours on 2 cores."""
    return CompareConfig(teacher=str(paths.TEACHER), methods=tuple(METHODS), budget=BUDGET, out="runs/compare-tiny")


COMPARE_RECIPES: dict[str, Callable[..., CompareConfig]] = {"tiny": compare_tiny}
