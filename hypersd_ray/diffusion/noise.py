"""Noise perturbation: offset noise.

Shapes
    eps   (B, C, ...)
"""

import torch
from torch import Tensor


def perturb(eps: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """eps + strength * randn(B, C, 1, ..., 1): one shift per sample and channel; (B, C, ...) -> same.

    strength is in standard deviations of eps; 0 returns eps as it is and draws nothing. The draw is made on the
    generator's device. Raises ValueError for a negative strength. Paper: Sec. 3.1, "noise perturbation [2]".
    """
    if strength < 0:
        raise ValueError(f"noise perturbation strength={strength} must be >= 0")
    if strength == 0:
        return eps
    shape = (*eps.shape[:2], *(1,) * (eps.ndim - 2))
    offset = torch.randn(shape, generator=generator, device=generator.device)
    return eps + strength * offset.to(eps)
