"""Methods that follow the teacher's trajectory, each as settings of one training step; they fit any base model.

A method is a function of the optimiser steps it may use in all and the range of guidance scales of its teacher (as
uncond + omega (cond - uncond)); methods that were published with one scale take the middle of the range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig

Trajectory = Literal["tscd", "lcm", "tcd", "perflow", "pd", "lightning"]
Omega = tuple[float, float]
MSE_ONLY = AdversarialConfig(adv_end=0.0, mse_end=1.0)


@dataclass(frozen=True)
class Settings:
    """What a method decides of a run."""

    distill: DistillConfig
    adversarial: AdversarialConfig = MSE_ONLY


def shared(steps: int, shares: Sequence[float]) -> tuple[int, ...]:
    """`steps` over stages in proportion to `shares`: they sum to it, and none is without.

    Raises:
        ConfigError: fewer steps than stages.
    """
    if steps < len(shares):
        raise ConfigError(f"{steps} steps for {len(shares)} stages: a stage needs at least one, raise the budget")
    free, total = steps - len(shares), sum(shares)
    ends = [round(free * sum(shares[: i + 1]) / total) for i in range(len(shares))]
    return tuple(1 + b - a for a, b in zip([0, *ends[:-1]], ends, strict=True))


def _middle(omega: Omega) -> float:
    return (omega[0] + omega[1]) / 2


def tscd(steps: int, omega: Omega, shares: Sequence[float] = (1, 1, 1, 1)) -> Settings:
    """Hyper-SD's trajectory segmented consistency distillation: k = 8, 4, 2, 1, MSE first, adversarial later (Sec. 3.1)."""
    return Settings(
        DistillConfig(steps_list=shared(steps, shares), omega_min=omega[0], omega_max=omega[1]),
        AdversarialConfig(),
    )


def lcm(steps: int, omega: Omega) -> Settings:
    """Latent consistency distillation: to clean data from 50 times, EMA target, Huber with c = 1e-3 (Luo et al. 2023)."""
    return Settings(
        DistillConfig(
            name="lcm", k_list=(1,), n_list=(50,), steps_list=(steps,), t_end="segment_start", target="ema",
            ema_decay=0.95, distance="huber", huber_c=1e-3, perturbation=0.0, omega_min=omega[0], omega_max=omega[1],
        )
    )  # fmt: skip


def tcd(steps: int, omega: Omega) -> Settings:
    """Trajectory consistency distillation: LCM with an end anywhere below (Zheng et al. 2024; CTM's target)."""
    return Settings(
        DistillConfig(
            name="tcd", k_list=(1,), n_list=(50,), steps_list=(steps,), t_end="uniform", target="ema",
            ema_decay=0.95, perturbation=0.0, omega_min=omega[0], omega_max=omega[1],
        )
    )  # fmt: skip


def perflow(steps: int, omega: Omega) -> Settings:
    """Piecewise rectified flow: straight lines in 4 windows, 8 teacher steps across each, in epsilon form, the teacher's
    guidance fixed (Yan et al. 2024)."""
    return Settings(
        DistillConfig(
            name="perflow", k_list=(4,), n_list=(32,), steps_list=(steps,), start="edges", t_end="segment_start",
            target="teacher", path="straight", perturbation=0.0, omega_min=_middle(omega), omega_max=_middle(omega),
        )
    )  # fmt: skip


def pd(steps: int, omega: Omega) -> Settings:
    """Progressive distillation: 32 steps into 16, 8, 4, 2, 1, each student the next one's teacher (Salimans, Ho 2022);
    guidance goes in with the first."""
    students = (16, 8, 4, 2, 1)
    return Settings(
        DistillConfig(
            name="pd", k_list=students, n_list=tuple(2 * k for k in students), steps_list=shared(steps, (1,) * 5),
            start="edges", t_end="segment_start", target="teacher", teacher="previous", perturbation=0.0,
            omega_min=_middle(omega), omega_max=_middle(omega),
        )
    )  # fmt: skip


def lightning(steps: int, omega: Omega) -> Settings:
    """SDXL-Lightning: 128 steps into 32 by MSE, then 8, 4, 2, 1 adversarially, each in two phases: a discriminator that
    sees where an end came from, then one that does not; pure noise at T (Lin et al. 2024)."""
    students = (8, 4, 2, 1)
    return Settings(
        DistillConfig(
            name="lightning", k_list=(32, *(k for k in students for _ in range(2))), n_list=(128, 32, 32, 8, 8, 4, 4, 2, 2),
            steps_list=shared(steps, (2,) + (1,) * 8), start="edges", pure_noise=True, t_end="segment_start",
            target="teacher", teacher="previous", perturbation=0.0, omega_min=_middle(omega), omega_max=_middle(omega),
        ),
        AdversarialConfig(
            kind="non_saturating", mse_start=1.0, mse_end=0.0, adv_start=0.0, adv_end=1.0, shape=0.0,
            conditional=(False, *(True, False) * 4),
        ),
    )  # fmt: skip


TRAJECTORIES: dict[str, Callable[[int, Omega], Settings]] = {
    "tscd": tscd, "lcm": lcm, "tcd": tcd, "perflow": perflow, "pd": pd, "lightning": lightning,
}  # fmt: skip
