"""Networks that are affine in x_t, one pair of numbers a time: on Gaussian data every ODE map is affine too, so a student
of this kind can be exact, and where training must end is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.parameterization import Prediction
from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.diffusion.solver import ode_solve
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import EMA, STUDENT, TEACHER, Roles
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.tscd import Batch

MEAN = 0.7
SCHEDULE = scaled_linear(16, 0.053, 0.75)
"""SD's schedule in 16 times: alpha ends at 0.03."""


class AffineRoles(Roles):
    """The teacher is the exact denoiser of N(MEAN, std^2); the others predict eps = a_t x_t + b_t and begin as it."""

    def __init__(self, std: float):
        self.schedule, self.std = SCHEDULE, std
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.tables: dict[str, dict[str, nn.Parameter]] = {}
        for role in (STUDENT, EMA):
            self.add(role)
        for p in self.tables[STUDENT].values():
            p.requires_grad_(True)

    def add(self, role: str, like: str | None = None) -> None:
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        a = sigma / (alpha**2 * self.std**2 + sigma**2).clamp(min=1e-12)
        values = {"a": a, "b": -a * alpha * MEAN}
        self.tables[role] = {n: nn.Parameter(v.clone(), requires_grad=False) for n, v in values.items()}

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self.tables[role]

    def predict(self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        alpha, sigma = self.schedule.at(t, x_t.ndim, x_t.dtype)
        if role == TEACHER:
            v = alpha**2 * self.std**2 + sigma**2
            eps = sigma / v * (x_t - alpha * MEAN)
        else:
            a, b = (self.tables[role][n][t].view(-1, 1, 1, 1) for n in ("a", "b"))
            eps = a * x_t + b
        return Prediction((x_t - sigma * eps) / alpha, eps)


def gaussian_batch(std: float, rows: int = 256, seed: int = 0) -> Batch:
    """x0 (B, 1, 2, 2) of N(MEAN, std^2)."""
    g = torch.Generator().manual_seed(seed)
    x0 = MEAN + std * torch.randn(rows, 1, 2, 2, generator=g, dtype=torch.float64)
    return Batch(x0, Conditioning(torch.zeros(rows, 1, 1)))


def train(config: TSCDConfig, std: float) -> AffineRoles:
    """Run all stages of `config`, as the loop does; returns the roles."""
    roles = AffineRoles(std)
    distiller = Distiller(config, roles, Conditioning(torch.zeros(1, 1, 1)))
    seed = 0
    while not distiller.finished:
        distiller.step(gaussian_batch(std, config.optim.batch, seed := seed + 1))
        if distiller.progress.step == distiller.steps:
            distiller.next_stage()
    return roles


def solve(roles: AffineRoles, role: str, x: Tensor, times: list[int]) -> Tensor:
    """DDIM along `times`."""
    with torch.no_grad():
        return ode_solve(roles.schedule, roles.denoiser(role, Conditioning(torch.zeros(len(x), 1, 1))), x, times)


def x_T(rows: int = 64) -> Tensor:
    """Noise (rows, 1, 2, 2)."""
    return torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
