"""Same-seed pictures of teacher and student, for a person to look at.

Latents (B, C, h, w); pictures uint8 (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypersd_ray.diffusion.segments import edges
from hypersd_ray.diffusion.solver import consistency_sample, ode_solve
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import TEACHER, Roles
from hypersd_ray.training.randomness import generator_of


def start_noise(seed: int, prompts: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """x_T (B, *shape): a function of the seed and each prompt's text, whatever it is batched with."""
    return torch.stack([torch.randn(shape, generator=generator_of(seed, "x_T", prompt)) for prompt in prompts])


@torch.no_grad()
def teacher_samples(
    roles: Roles, x_T: Tensor, cond: Conditioning, null: Conditioning, steps: int, omega: float
) -> Tensor:
    """The base's x_0 by `steps` DDIM steps under guidance `omega`."""
    scale = torch.full((len(x_T),), float(omega), device=x_T.device)
    return ode_solve(
        roles.schedule, roles.guided(TEACHER, cond, null, scale), x_T, edges(roles.schedule.T, steps)[::-1]
    )


@torch.no_grad()
def student_samples(
    roles: Roles, role: str, x_T: Tensor, cond: Conditioning, steps: int, eta: float = 0.0, seed: int = 0,
    times: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """A role's x_0 in `steps` consistency jumps on the training edges (or along `times`), without guidance."""
    generator = generator_of(seed, "eta") if eta > 0 else None
    return consistency_sample(roles.schedule, roles.denoiser(role, cond), x_T, steps, eta, generator, times)


def tile(rows: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Rows of pictures (B, 3, H, W) as one (3, rows * H, B * W) picture with white gaps."""
    padded = [torch.nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in rows]
    return torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
