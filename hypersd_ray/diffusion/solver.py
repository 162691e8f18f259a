"""The ODE solver Psi (DDIM) and the few-step sampler.

Shapes
    x_t, x_T           (B, ...)
    t, t_end           (B,) integer, t_end <= t
    times              a strictly decreasing list of integer times, in 0..T
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hypersd_ray.diffusion.parameterization import Prediction
from hypersd_ray.diffusion.schedule import Schedule, renoise
from hypersd_ray.diffusion.segments import edges

Denoiser = Callable[[Tensor, Tensor], Prediction]
"""(x_t (B, ...), t (B,)) -> Prediction. A prompt and a parameterisation are bound before it gets here."""


def jump(schedule: Schedule, prediction: Prediction, t_end: Tensor) -> Tensor:
    """Psi(x_t, prediction, t_end): the DDIM map x_s = alpha_s x0 + sigma_s eps; t_end (B,) -> (B, ...).

    Keeps the prediction's dtype. Paper: the solver Psi of Eq. 3..7 and 14; the same for teacher, student and EMA.
    """
    alpha_s, sigma_s = schedule.at(t_end, prediction.x0.ndim, prediction.x0.dtype)
    return alpha_s * prediction.x0 + sigma_s * prediction.eps


# Eq. 3
def ddim_step(schedule: Schedule, denoiser: Denoiser, x_t: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
    """Psi(x_t, f(x_t, t), t_end): one network call and one jump; (B, ...) -> (B, ...). Paper: Eq. 3, 4.

    Where t_end equals t, x_t comes back bit for bit: a consistency function is the identity there.
    """
    # A network knows no t = 0. The only step from there is the identity, so its answer at 1 is asked for and dropped.
    x_end = jump(schedule, denoiser(x_t, t.clamp(min=1)), t_end)
    return torch.where((t == t_end).view((-1,) + (1,) * (x_t.ndim - 1)), x_t, x_end)


def ode_solve(schedule: Schedule, denoiser: Denoiser, x_T: Tensor, times: Sequence[int]) -> Tensor:
    """Eq. 3 repeated along `times`: x_T (B, ...) lives at times[0], the result at times[-1], which may be any time.

    Raises ValueError when times does not fall strictly within 0..T. Calls the denoiser len(times) - 1 times.
    """
    _check_times(times, schedule.T)
    x = x_T
    for t, t_end in pairwise(times):
        x = ddim_step(schedule, denoiser, x, _full(x, t), _full(x, t_end))
    return x


def consistency_sample(
    schedule: Schedule,
    denoiser: Denoiser,
    x_T: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    times: Sequence[int] | None = None,
) -> Tensor:
    """Few-step sampling from x_T (B, ...) at times[0] to times[-1]; one network call a step.

    times: steps + 1 falling times; by default the training edges T, ..., round(T/steps), 0. eta in [0, 1] is TCD's
    gamma: each step goes on to t' = floor((1 - eta) t_next) and noises back up to t_next. eta = 0 is deterministic
    DDIM on the edges. generator: one for the batch, or one a sample, whose noise is then its own in any batch. Ends at
    t = 0 (alpha = 1), where diffusers' TCDScheduler ends at our t = 1. Paper: Sec. 3.3.

    Raises:
        ValueError: eta outside [0, 1], eta > 0 without a generator, times that do not fall or are not steps + 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be within [0, 1]")
    if eta > 0 and generator is None:
        raise ValueError(f"eta={eta} draws noise: pass a generator, or set eta=0")
    times = list(reversed(edges(schedule.T, steps))) if times is None else list(times)
    _check_times(times, schedule.T)
    if len(times) != steps + 1:
        raise ValueError(f"steps={steps} needs {steps + 1} times (start and end count), got {len(times)}")
    x = x_T
    for t, t_next in pairwise(times):
        # the small number: (1 - 0.9) * 750 must be 75, not floor(74.999...)
        t_low = math.floor((1 - eta) * t_next + 1e-9)
        x = ddim_step(schedule, denoiser, x, _full(x, t), _full(x, t_low))
        if generator is not None and t_low < t_next:
            noise = _noise_like(x, generator)
            x = renoise(schedule, x, _full(x, t_low), _full(x, t_next), noise)
    return x


def _noise_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Drawn where each generator is."""
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples: one each, or one for all")
    drawn = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator]
    return torch.stack(drawn).to(x.device)


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)


def _check_times(times: Sequence[int], T: int) -> None:
    falls = all(a > b for a, b in pairwise(times))
    if not times or not falls or times[0] > T or times[-1] < 0:
        raise ValueError(f"times={list(times)} must fall strictly within {T}..0")
