"""Recipes: typed functions that return a run's configuration. A new method or base model is a new function here.

`trajectory` holds the methods that follow the teacher's trajectory, as settings of one step; `tscd`, `onestep` and
`feedback` put methods on base models, a file a kind of run; `methods` has all of a comparison under one budget.
"""

from hypersd_ray.recipes.compare import COMPARE_RECIPES
from hypersd_ray.recipes.feedback import FEEDBACK_RECIPES
from hypersd_ray.recipes.methods import METHODS
from hypersd_ray.recipes.onestep import ONESTEP_RECIPES
from hypersd_ray.recipes.sweep import SWEEP_RECIPES
from hypersd_ray.recipes.tscd import RECIPES, TINY_PROMPTS

__all__ = [
    "COMPARE_RECIPES", "FEEDBACK_RECIPES", "METHODS", "ONESTEP_RECIPES", "RECIPES", "SWEEP_RECIPES", "TINY_PROMPTS",
]  # fmt: skip
