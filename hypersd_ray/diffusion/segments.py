"""Segments of the trajectory and the times a training sample is drawn at.

T time steps are cut into k segments; the solver walks a grid of N steps of about s = T/N. N is a multiple of k, so
every segment edge is a grid point and no solver step crosses an edge.

Shapes
    t_n, t_prev, t_end, t_b   (B,) int64, in 0..T;  t_b <= t_end <= t_prev < t_n
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

TEndRule = Literal["uniform", "segment_start", "previous", "two_steps"]
StartRule = Literal["grid", "edges"]


@dataclass(frozen=True, eq=False)
class Times:
    """Start t_n, solver's target t_prev, end t_end and segment start t_b of a batch; (B,) int64 each."""

    t_n: Tensor
    t_prev: Tensor
    t_end: Tensor
    t_b: Tensor


def edges(T: int, k: int) -> list[int]:
    """The k + 1 segment edges round(i T / k), i = 0..k. Raises ValueError unless 1 <= k <= T."""
    if not 1 <= k <= T:
        raise ValueError(f"k={k} segments must be within 1..T={T}")
    # i * T before the division: equal fractions must round alike for edges to be grid points
    return [round(i * T / k) for i in range(k + 1)]


def grid(T: int, N: int) -> list[int]:
    """The N + 1 solver times round(i T / N), i = 0..N. Raises ValueError unless 1 <= N <= T.

    The paper's list t_0..t_{N-1} has N points; ours has N steps, so N = 50 at T = 1000 is its s = 20.
    """
    if not 1 <= N <= T:
        raise ValueError(f"N={N} solver steps must be within 1..T={T}")
    return edges(T, N)


def check_grid(T: int, N: int, k: int) -> None:
    """Raises ValueError, with the nearest N accepted, unless k divides N and k <= N <= T (docs/design.md)."""
    if not 1 <= k <= T:
        raise ValueError(f"k={k} segments must be within 1..T={T}")
    nearest = min(max(round(N / k), 1), T // k) * k
    if N > T or N < 1:
        raise ValueError(f"N={N} solver steps must be within 1..T={T}; the nearest N accepted for k={k} is {nearest}")
    if N % k != 0:
        raise ValueError(f"N={N} solver steps is not a multiple of k={k} segments; the nearest N accepted is {nearest}")


# Eq. 13
def segment_start(t_n: Tensor, T: int, k: int) -> Tensor:
    """t_b (B,) of the left-open segment (t_b, t_b + T/k] that holds t_n (B,) in 1..T; 0 for t_n = 0.

    Differs from the paper's printed floor(t_n / ceil(T/k)) ceil(T/k), whose segments are right-open: it puts t_n = T
    into a segment of its own and a t_n just above an edge below the solver's target (docs/design.md).
    """
    table = torch.tensor(edges(T, k), device=t_n.device)
    above = torch.bucketize(t_n, table)  # the first edge >= t_n
    return table[above.clamp(min=1) - 1]


# Algorithm 1, lines 7 to 10
def sample_times(
    batch: int,
    T: int,
    N: int,
    k: int,
    t_end_rule: TEndRule,
    generator: torch.Generator,
    device: torch.device | str,
    start_rule: StartRule = "grid",
) -> Times:
    """Draw `batch` start times uniformly from the grid without 0, and the times that follow from them.

    start_rule: "grid" any of the N solver times; "edges" the k upper edges of the segments alone (a student of k steps
    is asked at no other time).

    t_end_rule: "uniform" integer uniform on [t_b, t_prev], both included (TSCD; CTM at k = 1); "segment_start" t_b
    (consistency distillation); "previous" t_prev (no bootstrap); "two_steps" two grid steps below t_n, not below t_b
    (progressive distillation of all grid times). Drawn on the generator's device, so a CPU generator gives the same
    times everywhere. Raises ValueError for a grid `check_grid` refuses or an unknown rule. Paper: Algorithm 1 lines
    7-10, Eq. 13.
    """
    check_grid(T, N, k)
    if start_rule not in get_args(StartRule):
        raise ValueError(f"start_rule={start_rule!r} is not one of {', '.join(get_args(StartRule))}")
    points = torch.tensor(grid(T, N), device=generator.device)
    starts, stride = (N, 1) if start_rule == "grid" else (k, N // k)
    n = stride * torch.randint(1, starts + 1, (batch,), generator=generator, device=generator.device)
    t_n, t_prev = points[n], points[n - 1]
    t_b = segment_start(t_n, T, k)
    if t_end_rule == "uniform":
        t_end = uniform_between(t_b, t_prev, generator)
    elif t_end_rule == "segment_start":
        t_end = t_b
    elif t_end_rule == "previous":
        t_end = t_prev
    elif t_end_rule == "two_steps":
        t_end = torch.maximum(points[(n - 2).clamp(min=0)], t_b)
    else:
        raise ValueError(f"t_end_rule={t_end_rule!r} is not one of {', '.join(get_args(TEndRule))}")
    return Times(t_n.to(device), t_prev.to(device), t_end.to(device), t_b.to(device))


def solver_times(times: Times, T: int, N: int, steps: int) -> list[Tensor]:
    """The `steps` + 1 times, (B,) each, at which a solver stands that walks the grid of N from t_n down to t_end.

    A row that is at its t_end stays there, so `steps` may exceed what it needs; N // k is enough for every rule.
    """
    points = torch.tensor(grid(T, N), device=times.t_n.device)
    n = torch.bucketize(times.t_n, points)
    below = (points[(n - i).clamp(min=0)] for i in range(1, steps + 1))
    return [times.t_n, *(torch.maximum(t, times.t_end) for t in below)]


def uniform_between(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """One integer uniform on [low, high] per element, both ends included; (B,) -> (B,)."""
    u = torch.rand(low.shape, generator=generator, device=generator.device, dtype=torch.float64).to(low.device)
    drawn = low + (u * (high - low + 1)).floor().long()
    return torch.minimum(drawn, high)  # u * n may round up to n
