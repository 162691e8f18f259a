"""Classifier-free guidance of the teacher's solver step.

Shapes
    cond, uncond   (B, ...)   predictions with the prompt and with the null prompt
    omega          (B,)       guidance scale, unit-free; 1 = no guidance
"""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, omega: Tensor) -> Tensor:
    """uncond + omega (cond - uncond), omega (B,) one per sample -> (B, ...).

    LCM's and PCM's w is omega - 1. Any linear parameterisation may be guided; all give the same step. Paper: the
    omega of Algorithm 1 line 6. Raises ValueError when omega is not (B,).
    """
    if omega.shape != cond.shape[:1]:
        raise ValueError(f"omega must be ({cond.shape[0]},), one per sample, got {tuple(omega.shape)}")
    return uncond + omega.view((-1,) + (1,) * (cond.ndim - 1)) * (cond - uncond)
