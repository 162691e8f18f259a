"""Same-seed pictures of teacher and student, for a person to look at.

Latents (B, C, h, w); pictures uint8 (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.diffusion.segments import edges
from hypersd_ray.diffusion.solver import Denoiser, consistency_sample, ode_solve
from hypersd_ray.diffusion.windows import straight_sample
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import TEACHER, Roles
from hypersd_ray.training.randomness import generator_of


@dataclass(frozen=True)
class Sampling:
    """How a student is sampled.

    Attributes:
        steps: network calls.
        times: the steps + 1 falling times; None is the training edges.
        eta: the noise put back after each step, TCD's gamma: 0 none (DDIM), 1 all of it (LCM, Turbo, DMD2).
        windows: where the student flows along straight lines (PeRFlow), their number; the steps then fall on their
            edges. None jumps.
    """

    steps: int
    times: tuple[int, ...] | None = None
    eta: float = 0.0
    windows: int | None = None


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
    roles: Roles,
    role: str,
    x_T: Tensor,
    cond: Conditioning,
    sampling: Sampling | int,
    seed: int = 0,
    keys: Sequence[str] | None = None,
) -> Tensor:
    """A role's x_0, without guidance; `sampling` as a number of steps is that many jumps on the training edges.

    `keys` names the samples: the noise of eta > 0 is then a function of (seed, key), whatever the batch.
    """
    how = Sampling(sampling) if isinstance(sampling, int) else sampling
    return sample(roles.schedule, roles.denoiser(role, cond), x_T, how, seed, keys)


@torch.no_grad()
def sample(
    schedule: Schedule, denoiser: Denoiser, x_T: Tensor, how: Sampling, seed: int, keys: Sequence[str] | None = None
) -> Tensor:
    """The x_0 that a denoiser, guided or not, comes to; `keys` as in `student_samples`."""
    if how.windows is not None:
        times = how.times or edges(schedule.T, how.steps)[::-1]
        return straight_sample(schedule, denoiser, x_T, times, how.windows)
    generator: torch.Generator | list[torch.Generator] | None = None
    if how.eta > 0:
        generator = generator_of(seed, "eta") if keys is None else [generator_of(seed, "eta", key) for key in keys]
    return consistency_sample(schedule, denoiser, x_T, how.steps, how.eta, generator, how.times)


def tile(rows: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Rows of pictures (B, 3, H, W) as one (3, rows * H, B * W) picture with white gaps."""
    padded = [torch.nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in rows]
    return torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
