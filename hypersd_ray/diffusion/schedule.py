"""The noise schedule: alpha and sigma at every integer time, and the forward process.

Shapes
    alpha, sigma   (T+1,) float64     index t; t = 0 is clean data (1, 0), t = T the noisiest point
    acp            (T,) float64       diffusers' `alphas_cumprod`; its index i is our t = i + 1
    t              (B,) integer
    x0, eps, x_t   (B, ...)           x_t = alpha_t * x0 + sigma_t * eps
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha(t) and sigma(t) of x_t = alpha_t x0 + sigma_t eps, tabulated at t = 0..T.

    alpha, sigma: (T+1,) float64. Raises ValueError when they are not such a table: alpha falls from 1, sigma rises
    from 0. Paper: the functions alpha(t), sigma(t) of Algorithm 1.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) < 2:
            shapes = f"{tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            raise ValueError(f"alpha and sigma must both be (T+1,) with T >= 1, got {shapes}")
        if self.alpha.dtype != torch.float64 or self.sigma.dtype != torch.float64:
            raise ValueError(f"alpha and sigma must be float64, got {self.alpha.dtype} and {self.sigma.dtype}")
        if self.alpha[0] != 1 or self.sigma[0] != 0:
            raise ValueError(f"t = 0 must be clean data (1, 0), got ({self.alpha[0]:.6g}, {self.sigma[0]:.6g})")
        if not bool((self.alpha.diff() < 0).all() and (self.sigma.diff() > 0).all() and self.alpha[-1] >= 0):
            raise ValueError("alpha must fall to >= 0 and sigma rise strictly with t; check the betas")

    @property
    def T(self) -> int:
        """The noisiest time; times run over 0..T."""
        return len(self.alpha) - 1

    def at(self, t: Tensor, ndim: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at integer t (B,), on t's device, each (B, 1, ..., 1) with `ndim` dimensions.

        Raises IndexError for a t outside 0..T (on CUDA: a device assertion) and ValueError for a t that is not integer.
        """
        if t.is_floating_point():
            raise ValueError(f"t must be an integer tensor, got {t.dtype}: times are the integers 0..{self.T}")
        shape = (-1,) + (1,) * (ndim - 1)
        # index_select, not [t]: a negative index must fail, not wrap round to the noisiest point
        alpha = self.alpha.to(t.device).index_select(0, t.long())
        sigma = self.sigma.to(t.device).index_select(0, t.long())
        return alpha.to(dtype).view(shape), sigma.to(dtype).view(shape)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same table on `device`; `at` then copies nothing between devices."""
        return Schedule(self.alpha.to(device), self.sigma.to(device))


def from_alphas_cumprod(acp: Tensor) -> Schedule:
    """The variance preserving schedule of acp (T,), diffusers' `alphas_cumprod`: alpha^2 = acp, sigma^2 = 1 - acp.

    Raises ValueError when acp does not fall within [0, 1).
    """
    alpha_squared = torch.cat([torch.ones(1, dtype=torch.float64), acp.detach().cpu().double()])
    # the clamp keeps a broken table out of sqrt's NaN; Schedule then refuses it by name
    return Schedule(alpha_squared.clamp(min=0).sqrt(), (1 - alpha_squared).clamp(min=0).sqrt())


def _from_betas(betas: Tensor) -> Schedule:
    return from_alphas_cumprod(torch.cumprod(1 - betas, dim=0))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """SD1.5's and SDXL's schedule: sqrt(beta) is linear in t. (T,) betas, unit-free."""
    return _from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """DDPM's schedule: beta is linear in t (Ho et al., the paper's [3])."""
    return _from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def cosine(T: int = 1000) -> Schedule:
    """The cosine schedule of Nichol and Dhariwal, diffusers' `squaredcos_cap_v2`: offset 0.008, beta at most 0.999."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    acp = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return _from_betas((1 - acp[1:] / acp[:-1]).clamp(max=0.999))


def flow(T: int = 1000) -> Schedule:
    """The straight path of rectified flow: alpha = 1 - t/T, sigma = t/T. alpha_T is 0: no epsilon prediction on it."""
    sigma = torch.arange(T + 1, dtype=torch.float64) / T
    return Schedule(1 - sigma, sigma)


def _rescale_to_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale alpha so that alpha_T = 0 and alpha_1 stays (Lin et al. 2023, Alg. 1)."""
    alpha = schedule.alpha[1:]
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return from_alphas_cumprod(alpha**2)


def from_scheduler_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers scheduler_config.json.

    Reads num_train_timesteps, beta_schedule, beta_start, beta_end, and when there trained_betas,
    rescale_betas_zero_snr and prediction_type (absent: epsilon, as in SD1.5's file). Raises ValueError for a missing
    field, a beta_schedule we do not know, and zero terminal SNR with epsilon prediction: x0 = (x - sigma eps) / alpha
    divides by zero there.
    """
    rescale = bool(config.get("rescale_betas_zero_snr", False))
    if rescale and config.get("prediction_type", "epsilon") == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr=true with prediction_type=epsilon: alpha_T = 0 leaves x0 undefined at T; "
            "set rescale_betas_zero_snr=false or use a v_prediction model"
        )
    if config.get("trained_betas") is not None:
        schedule = _from_betas(torch.tensor(config["trained_betas"], dtype=torch.float64))
    else:
        schedule = _from_named_betas(config)
    return _rescale_to_zero_terminal_snr(schedule) if rescale else schedule


def _from_named_betas(config: Mapping[str, Any]) -> Schedule:
    missing = [f for f in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end") if f not in config]
    if missing:
        raise ValueError(f"scheduler config lacks {', '.join(missing)}; a flow-matching model wants schedule.flow(T)")
    name, T = config["beta_schedule"], int(config["num_train_timesteps"])
    if name == "scaled_linear":
        return scaled_linear(T, config["beta_start"], config["beta_end"])
    if name == "linear":
        return linear(T, config["beta_start"], config["beta_end"])
    if name == "squaredcos_cap_v2":
        return cosine(T)
    raise ValueError(f"beta_schedule={name!r} is not one of scaled_linear, linear, squaredcos_cap_v2")


# Eq. 1, in closed form
def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps: x0, eps (B, ...), t (B,) -> (B, ...), in float32 at least.

    Paper: Eq. 1; Algorithm 1 line 12 with x0 = E(x) (the paper prints the noise z in its place).
    """
    dtype = torch.promote_types(torch.promote_types(x0.dtype, eps.dtype), torch.float32)
    alpha_t, sigma_t = schedule.at(t, x0.ndim, dtype)
    return alpha_t * x0 + sigma_t * eps


# Eq. 1 from s to t
def renoise(schedule: Schedule, x_s: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
    """Carry x_s at t_from = s forward to t_to = t >= s: (alpha_t / alpha_s) x_s + the variance that is missing.

    x_s, noise (B, ...), t_from, t_to (B,) -> (B, ...), in float32 at least. x_s itself comes back where t_to = t_from.
    A t_to below t_from is not checked (it would wait for the device). Paper: Eq. 1; used by TCD's sampler (Sec. 3.3).
    """
    dtype = torch.promote_types(torch.promote_types(x_s.dtype, noise.dtype), torch.float32)
    alpha_s, sigma_s = schedule.at(t_from, x_s.ndim, torch.float64)
    alpha_t, sigma_t = schedule.at(t_to, x_s.ndim, torch.float64)
    # float64: the two variances nearly cancel for neighbouring times; equal alphas (0/0 at alpha_T = 0) mean ratio 1
    ratio = torch.where(alpha_t == alpha_s, 1.0, alpha_t / alpha_s)
    std = (sigma_t**2 - ratio**2 * sigma_s**2).clamp(min=0).sqrt()
    return ratio.to(dtype) * x_s + std.to(dtype) * noise
