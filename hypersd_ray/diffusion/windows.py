"""Straight lines within time windows: piecewise rectified flow (PeRFlow).

The teacher's ODE carries x_top, at a window's upper edge t_top, to x_b at its lower edge t_b. The student flows along
the straight line between the two, at constant velocity in t:

    x_t = x_b + s (x_top - x_b),   s = (t - t_b) / (t_top - t_b)

Its network is that of a diffusion model, so it names the line by a noise: the eps whose one DDIM step crosses the window,

    x_b = lam x_top + eta eps,   lam = alpha_b / alpha_top,   eta = sigma_b - lam sigma_top

From x_t and eps both ends follow. At an upper edge x_t is x_top: there a student is sampled by plain DDIM. A schedule
whose alpha reaches 0 at T has no such eps in its first window.

Shapes
    x_top, x_b, x_t, eps   (B, ...)
    t, t_top, t_b, t_end   (B,) integer, t_b <= t_end <= t <= t_top, t_b < t_top
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.diffusion.segments import edges, segment_start
from hypersd_ray.diffusion.solver import Denoiser


@dataclass(frozen=True, eq=False)
class Window:
    """Edges of each row's window, (B,) integer."""

    t_top: Tensor
    t_b: Tensor

    def share(self, t: Tensor, like: Tensor) -> Tensor:
        """s of t: 0 at t_b, 1 at t_top; (B, 1, ..., 1) with `like`'s dimensions and dtype."""
        s = (t - self.t_b).to(like.dtype) / (self.t_top - self.t_b).to(like.dtype)
        return s.view((-1,) + (1,) * (like.ndim - 1))


def windows_of(t: Tensor, T: int, k: int) -> Window:
    """The windows, of k, that hold t (B,) in 1..T; an edge belongs to the window below it."""
    table = torch.tensor(edges(T, k), device=t.device)
    return Window(table[torch.bucketize(t, table)], segment_start(t, T, k))


def _crossing(schedule: Schedule, window: Window, like: Tensor) -> tuple[Tensor, Tensor]:
    """lam and eta."""
    alpha_top, sigma_top = schedule.at(window.t_top, like.ndim, like.dtype)
    alpha_b, sigma_b = schedule.at(window.t_b, like.ndim, like.dtype)
    lam = alpha_b / alpha_top
    return lam, sigma_b - lam * sigma_top


def on_line(x_top: Tensor, x_b: Tensor, t: Tensor, window: Window) -> Tensor:
    """x_t of the line between a window's ends: (B, ...)."""
    return x_b + window.share(t, x_b) * (x_top - x_b)


def line_eps(schedule: Schedule, x_top: Tensor, x_b: Tensor, window: Window) -> Tensor:
    """The eps that names the line from x_top to x_b: (B, ...); one for all its times."""
    lam, eta = _crossing(schedule, window, x_b)
    return (x_b - lam * x_top) / eta


def line_ends(schedule: Schedule, eps: Tensor, x_t: Tensor, t: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """x_top and x_b of the line through x_t at t that eps names; the inverse of `on_line` and `line_eps`."""
    (lam, eta), s = _crossing(schedule, window, x_t), window.share(t, x_t)
    # x_t = (1 - s) x_b + s x_top with x_b = lam x_top + eta eps
    x_top = (x_t - (1 - s) * eta * eps) / ((1 - s) * lam + s)
    return x_top, lam * x_top + eta * eps


def straight_sample(schedule: Schedule, denoiser: Denoiser, x_T: Tensor, times: Sequence[int], k: int) -> Tensor:
    """Euler along the lines of k windows, from x_T (B, ...) at times[0] to times[-1]; one network call a step.

    Raises ValueError when a step would cross an edge: `times` must hold those between its ends.
    """
    missed = [e for e in edges(schedule.T, k) if times[-1] < e < times[0] and e not in times]
    if missed:
        raise ValueError(f"times={list(times)} step across the edges {missed} of k={k} windows: sample on them")
    x = x_T
    for now, then in pairwise(times):
        t = torch.full((len(x),), now, dtype=torch.long, device=x.device)
        window = windows_of(t, schedule.T, k)
        x = on_line(*line_ends(schedule, denoiser(x, t).eps, x, t, window), torch.full_like(t, then), window)
    return x
