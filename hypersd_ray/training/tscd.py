"""The distillation step: Algorithm 1, lines 6 to 14, for one micro-batch.

Shapes: x0, eps, x_t (B, C, h, w) latents; t_n, t_prev, t_end (B,); omega (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_ray.config.tscd import DistillConfig
from hypersd_ray.diffusion.noise import perturb
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import Times, sample_times
from hypersd_ray.diffusion.solver import Denoiser, ddim_step
from hypersd_ray.losses.consistency import Distance, loss_tscd
from hypersd_ray.losses.distances import mse, pseudo_huber
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, TEACHER, Roles


@dataclass(frozen=True)
class Batch:
    """x0 (B, C, h, w): scaled latents of the images; cond: their captions."""

    x0: Tensor
    cond: Conditioning

    def chunks(self, parts: int) -> list[Batch]:
        """`parts` equal micro-batches."""
        size = len(self.x0) // parts
        return [
            Batch(self.x0[i : i + size], self.cond._map(lambda part, i=i: part[i : i + size]))
            for i in range(0, size * parts, size)
        ]


@dataclass(frozen=True)
class Pair:
    """Both sides of Eq. 14: where the student's and the target's jumps end."""

    student: Tensor
    target: Tensor
    times: Times


def empty_some(batch: Batch, null: Conditioning, share: float, generator: torch.Generator) -> Batch:
    """The batch with each caption emptied with probability `share`; at 0 nothing is drawn."""
    if share == 0:
        return batch
    empty = (torch.rand(len(batch.x0), generator=generator) < share).to(batch.x0.device)
    return Batch(batch.x0, batch.cond.emptied(null, empty))


def draw_x_tn(roles: Roles, batch: Batch, t_n: Tensor, perturbation: float, generator: torch.Generator) -> Tensor:
    """Algorithm 1, lines 11 and 12: x_{t_n} = alpha x0 + sigma eps, eps with the noise perturbation of Sec. 3.1."""
    eps = torch.randn(batch.x0.shape, generator=generator)
    return add_noise(roles.schedule, batch.x0, perturb(eps, perturbation, generator).to(batch.x0.device), t_n)


def solver(
    roles: Roles, batch: Batch, null: Conditioning, config: DistillConfig, stage: int, generator: torch.Generator
) -> Denoiser:
    """Who makes the solver's step: the guided base, or from stage 2 on the previous stage's student, already guided."""
    omega = config.omega_min + (config.omega_max - config.omega_min) * torch.rand(len(batch.x0), generator=generator)
    if config.teacher == "previous" and stage > 0:
        return roles.denoiser(PREVIOUS, batch.cond)
    if config.omega_min == config.omega_max == 1:
        return roles.denoiser(TEACHER, batch.cond)
    return roles.guided(TEACHER, batch.cond, null, omega.to(batch.x0.device))


@torch.no_grad()
def target_x_end(roles: Roles, batch: Batch, teacher: Denoiser, x_tn: Tensor, times: Times, target: str) -> Tensor:
    """The right side of Eq. 14: one solver step down (Eq. 3), then one jump of the target network to t_end."""
    x_prev = ddim_step(roles.schedule, teacher, x_tn, times.t_n, times.t_prev)
    second = {
        "ema": lambda: roles.denoiser(EMA, batch.cond),
        "student": lambda: roles.denoiser(STUDENT, batch.cond),
        "teacher": lambda: teacher,
    }[target]()
    return ddim_step(roles.schedule, second, x_prev, times.t_prev, times.t_end)


def make_pair(
    roles: Roles, batch: Batch, null: Conditioning, config: DistillConfig, stage: int, generator: torch.Generator
) -> Pair:
    """Draw times and noise, and make both sides of Eq. 14; the student's carries the gradient."""
    k, n = config.k_list[stage], config.n_list[stage]
    times = sample_times(len(batch.x0), roles.schedule.T, n, k, config.t_end, generator, batch.x0.device)
    x_tn = draw_x_tn(roles, batch, times.t_n, config.perturbation, generator)
    teacher = solver(roles, batch, null, config, stage, generator)
    target = target_x_end(roles, batch, teacher, x_tn, times, config.target)
    student = ddim_step(roles.schedule, roles.denoiser(STUDENT, batch.cond), x_tn, times.t_n, times.t_end)
    return Pair(student, target, times)


def distance(config: DistillConfig) -> Distance:
    """The non-adversarial part of d."""
    if config.distance == "huber":
        return lambda pred, target: pseudo_huber(pred, target, config.huber_c)
    return mse


def consistency_loss(pair: Pair, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Eq. 14 over a micro-batch: a scalar. Eq. 5, 6 and 7 are this with other times and targets."""
    return loss_tscd(pair.student, pair.target, measure).mean()
