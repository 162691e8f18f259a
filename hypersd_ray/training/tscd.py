"""The distillation step: Algorithm 1, lines 6 to 14, for one micro-batch.

Shapes: x0, eps, x_t (B, C, h, w) latents; t_n, t_prev, t_end (B,); omega (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hypersd_ray.config.tscd import DistillConfig
from hypersd_ray.diffusion.noise import perturb
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import Times, sample_times, solver_times, uniform_between
from hypersd_ray.diffusion.solver import Denoiser, ddim_step
from hypersd_ray.diffusion.windows import Window, line_eps, on_line
from hypersd_ray.losses.consistency import Distance, loss_tscd
from hypersd_ray.losses.distances import mse, pseudo_huber
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, TEACHER, Roles


@dataclass(frozen=True)
class Batch:
    """x0 (B, C, h, w): scaled latents of the images; cond: their captions, encoded; for who asks captions: as text, and
    keys: the images' names in the shards."""

    x0: Tensor
    cond: Conditioning
    captions: Sequence[str] = ()
    keys: Sequence[str] = ()

    @classmethod
    def from_rows(cls, rows: dict[str, Any], device: torch.device | str) -> Batch:
        """From a `LatentStream` batch."""

        def part(name: str) -> Tensor:
            return rows[name].to(device, torch.float32)

        pooled, time_ids = (part(name) if name in rows else None for name in ("pooled", "time_ids"))
        cond = Conditioning(part("prompt_embeds"), pooled, time_ids)
        return cls(part("latents"), cond, tuple(rows["caption"]), tuple(rows["key"]))

    def chunks(self, parts: int) -> list[Batch]:
        """`parts` equal micro-batches."""
        size = len(self.x0) // parts
        return [self.rows(i, i + size) for i in range(0, size * parts, size)]

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop-1."""
        which = slice(start, stop)
        return Batch(self.x0[which], self.cond.rows(which), self.captions[which], self.keys[which])


@dataclass(frozen=True)
class Pair:
    """Both sides of Eq. 14: where the student's and the target's jumps end, and x_{t_n} (B, C, h, w), where they began."""

    student: Tensor
    target: Tensor
    times: Times
    x_tn: Tensor


def empty_some(batch: Batch, null: Conditioning, share: float, generator: torch.Generator) -> Batch:
    """The batch with each caption emptied with probability `share`; at 0 nothing is drawn."""
    if share == 0:
        return batch
    empty = (torch.rand(len(batch.x0), generator=generator) < share).to(batch.x0.device)
    return replace(batch, cond=batch.cond.emptied(null, empty))


def draw_x_tn(roles: Roles, batch: Batch, t_n: Tensor, config: DistillConfig, generator: torch.Generator) -> Tensor:
    """Algorithm 1, lines 11 and 12: x_{t_n} = alpha x0 + sigma eps, eps with the noise perturbation of Sec. 3.1."""
    eps = perturb(torch.randn(batch.x0.shape, generator=generator), config.perturbation, generator)
    eps = eps.to(batch.x0.device)
    x_tn = add_noise(roles.schedule, batch.x0, eps, t_n)
    return torch.where((t_n == roles.schedule.T).view(-1, 1, 1, 1), eps, x_tn) if config.pure_noise else x_tn


def solver(
    roles: Roles, batch: Batch, null: Conditioning, config: DistillConfig, stage: int, generator: torch.Generator
) -> Denoiser:
    """Who makes the solver's steps: the guided base, or once k fell the student of the k before, already guided."""
    omega = config.omega_min + (config.omega_max - config.omega_min) * torch.rand(len(batch.x0), generator=generator)
    if not config.taught_by_base(stage):
        return roles.denoiser(PREVIOUS, batch.cond)
    if config.omega_min == config.omega_max == 1:
        return roles.denoiser(TEACHER, batch.cond)
    return roles.guided(TEACHER, batch.cond, null, omega.to(batch.x0.device))


@torch.no_grad()
def target_x_end(
    roles: Roles, batch: Batch, teacher: Denoiser, x_tn: Tensor, times: Times, config: DistillConfig, stage: int
) -> Tensor:
    """The right side of Eq. 14: one solver step down (Eq. 3), then one jump of the target network to t_end; or where
    the target is the teacher's, its steps all the way (Eq. 3 and 4)."""
    if config.target == "teacher":
        steps = solver_times(times, roles.schedule.T, config.n_list[stage], config.solver_steps(stage))
        x = x_tn
        for t, t_next in pairwise(steps):
            x = ddim_step(roles.schedule, teacher, x, t, t_next)
        return x
    x_prev = ddim_step(roles.schedule, teacher, x_tn, times.t_n, times.t_prev)
    role = {"ema": EMA, "student": STUDENT}[config.target]
    return ddim_step(roles.schedule, roles.denoiser(role, batch.cond), x_prev, times.t_prev, times.t_end)


def make_pair(
    roles: Roles, batch: Batch, null: Conditioning, config: DistillConfig, stage: int, generator: torch.Generator
) -> Pair:
    """Draw times and noise, and make both sides of Eq. 14; the student's carries the gradient."""
    k, n = config.k_list[stage], config.n_list[stage]
    times = sample_times(len(batch.x0), roles.schedule.T, n, k, config.t_end, generator, batch.x0.device, config.start)
    x_tn = draw_x_tn(roles, batch, times.t_n, config, generator)
    teacher = solver(roles, batch, null, config, stage, generator)
    target = target_x_end(roles, batch, teacher, x_tn, times, config, stage)
    if config.path == "straight":
        return line_pair(roles, batch, x_tn, target, times, generator)
    student = ddim_step(roles.schedule, roles.denoiser(STUDENT, batch.cond), x_tn, times.t_n, times.t_end)
    return Pair(student, target, times, x_tn)


def line_pair(roles: Roles, batch: Batch, x_top: Tensor, x_b: Tensor, times: Times, generator: torch.Generator) -> Pair:
    """Both sides of piecewise rectified flow: the noise that names the line from x_top to x_b, and the one that the
    student sees at a time of the window drawn uniformly. Equal noises are equal velocities."""
    window = Window(times.t_n, times.t_end)
    t = uniform_between(window.t_b + 1, window.t_top, generator)
    x_t = on_line(x_top, x_b, t, window)
    return Pair(
        roles.predict(STUDENT, x_t, t, batch.cond).eps, line_eps(roles.schedule, x_top, x_b, window), times, x_top
    )


def distance(config: DistillConfig) -> Distance:
    """The non-adversarial part of d."""
    if config.distance == "huber":
        return lambda pred, target: pseudo_huber(pred, target, config.huber_c)
    return mse


def consistency_loss(pair: Pair, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Eq. 14 over a micro-batch: a scalar. Eq. 5, 6, 7 and PeRFlow's are this with other times and targets."""
    return loss_tscd(pair.student, pair.target, measure).mean()
