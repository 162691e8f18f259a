"""From a `PerceptionConfig` to the model it names."""

from __future__ import annotations

import torch

from hypersd_ray.config.rewards import PerceptionConfig
from hypersd_ray.models.perception.mask2former import load_mask2former
from hypersd_ray.models.perception.protocol import PerceptionModel
from hypersd_ray.models.perception.solo_model import load_solo

LOADERS = {"solo": load_solo, "mask2former": load_mask2former}


def load_perception(
    config: PerceptionConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PerceptionModel:
    """The model in evaluation mode, frozen.

    Raises:
        ValueError: a file is missing or does not fit; one line with its name.
    """
    model = LOADERS[config.name](config.checkpoint, config.short_side)
    return model.eval().requires_grad_(False).to(device, dtype)
