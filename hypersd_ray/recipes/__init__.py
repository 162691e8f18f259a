"""Recipes: typed functions that return a run's configuration. A new method or base model is a new function here."""

from hypersd_ray.recipes.feedback import FEEDBACK_RECIPES
from hypersd_ray.recipes.onestep import ONESTEP_RECIPES
from hypersd_ray.recipes.tscd import RECIPES, TINY_PROMPTS

__all__ = ["FEEDBACK_RECIPES", "ONESTEP_RECIPES", "RECIPES", "TINY_PROMPTS"]
