"""Distances d(pred, target), one number per sample, in float32 at least.

Shapes
    pred, target   (B, ...)
    result         (B,), the mean over all other dimensions
"""

import torch
from torch import Tensor


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have one shape")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return (pred.to(dtype) - target.to(dtype)).flatten(1)


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample: (B, ...), (B, ...) -> (B,). Raises ValueError when the shapes differ.

    The mean, where the paper's norm (Eq. 5..7) is the sum: the scale then does not depend on the resolution.
    """
    return _difference(pred, target).square().mean(dim=1)


def pseudo_huber(pred: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """mean(sqrt(d^2 + c^2) - c) per sample, element by element: (B, ...), (B, ...) -> (B,).

    c is in units of the latent: quadratic well below it, absolute well above; 1e-3 is LCM's value. Raises ValueError
    for c <= 0 or when the shapes differ.
    """
    if c <= 0:
        raise ValueError(f"pseudo_huber c={c} must be > 0")
    d2 = _difference(pred, target).square()
    # d^2 / (sqrt(d^2 + c^2) + c) is the same number without subtracting two that nearly cancel
    return (d2 / ((d2 + c * c).sqrt() + c)).mean(dim=1)
