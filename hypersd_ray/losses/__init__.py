"""Losses as functions of predictions, never of networks. Knows torch and nothing else."""

from hypersd_ray.losses.schedule import LossWeights

__all__ = ["LossWeights"]
