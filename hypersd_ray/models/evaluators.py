"""One face for all that judges pictures: `evaluator(images, told) -> (B,)`, and its value with its gradient in one call.

`told` has one entry a sample: a prompt for a reward model; for a perception model an annotation (`Instances`), or the
real picture (3, H, W) whose objects the model finds by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.models.perception.protocol import Instances, PerceptionModel
from hypersd_ray.models.perception.registry import load_perception
from hypersd_ray.models.rewards.protocol import Scored
from hypersd_ray.models.rewards.registry import load_reward

Evaluator = Callable[[Tensor, Sequence[Any]], Tensor]
SURE = 0.5
"""Least score of a found object that stands in for an annotation."""


class InstanceLoss(nn.Module):
    """L_instance of Eq. 16 as an evaluator: lower is better."""

    def __init__(self, model: PerceptionModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, told: Sequence[Instances | Tensor]) -> Tensor:
        """Losses (B,) against annotations, or against the model's own prediction on a real picture in [0, 1]."""
        targets = [t if isinstance(t, Instances) else self._find(t.to(images)) for t in told]
        return self.model.loss(images, targets)

    def _find(self, real: Tensor) -> Instances:
        return self.model.predict(real[None])[0].above(SURE)


def load_evaluator(
    config: RewardConfig | PerceptionConfig, device: torch.device | str = "cpu", precision: str = "fp32"
) -> nn.Module:
    """The model of `config` as an evaluator.

    Raises:
        ValueError: a checkpoint cannot be loaded; one line with its file.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if isinstance(config, PerceptionConfig):
        return InstanceLoss(load_perception(config, device, dtype))
    return load_reward(config, device, dtype)


def evaluate(evaluator: Evaluator, images: Tensor, told: Sequence[Any], gradient: bool) -> Scored:
    """Values (B,) and, when asked, d value_i / d image_i (B, 3, H, W), both float32.

    The gradient of the sum is each sample's own because samples do not interact.
    """
    if not gradient:
        with torch.no_grad():
            return Scored(evaluator(images, told).float(), None)
    x = images.detach().float().requires_grad_(True)
    with torch.enable_grad():
        values = evaluator(x, told).float()
        if not values.requires_grad:  # for example Eq. 16 on pictures without objects
            return Scored(values, torch.zeros_like(x))
        (d_values,) = torch.autograd.grad(values.sum(), x)
    return Scored(values.detach(), d_values)
