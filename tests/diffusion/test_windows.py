"""Straight lines in windows: identities, and point-mass and Gaussian data whose windows' ends are known."""

from __future__ import annotations

import pytest
import torch

from hypersd_ray.diffusion.parameterization import Prediction
from hypersd_ray.diffusion.schedule import add_noise, cosine, scaled_linear
from hypersd_ray.diffusion.segments import Times, edges, grid, sample_times, segment_start, solver_times
from hypersd_ray.diffusion.solver import ddim_step, jump
from hypersd_ray.diffusion.windows import Window, line_ends, line_eps, on_line, straight_sample, windows_of
from tests.diffusion.test_closed_forms import gaussian_flow

SCHEDULE = scaled_linear()


def draws(rows: int, count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(count)]


def full(rows: int, t: int) -> torch.Tensor:
    return torch.full((rows,), t)


@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_every_time_lies_in_one_window(k):
    t = torch.arange(1, 1001)
    window, cuts = windows_of(t, 1000, k), edges(1000, k)
    assert torch.equal(window.t_b, segment_start(t, 1000, k))
    assert [cuts[cuts.index(b) + 1] for b in window.t_b.tolist()] == window.t_top.tolist()
    assert bool(((window.t_b < t) & (t <= window.t_top)).all())


@pytest.mark.parametrize("schedule", [scaled_linear(), cosine()], ids=["scaled_linear", "cosine"])
def test_a_noise_names_a_line_and_the_line_its_ends(schedule):
    x_top, x_b = draws(4, 2)
    window = Window(torch.tensor([999, 750, 500, 250]), torch.tensor([750, 500, 250, 0]))
    eps = line_eps(schedule, x_top, x_b, window)
    for t in (window.t_top, window.t_b + 1, (window.t_top + window.t_b) // 2):
        ends = line_ends(schedule, eps, on_line(x_top, x_b, t, window), t, window)
        torch.testing.assert_close(ends, (x_top, x_b), rtol=1e-8, atol=1e-8)
    # the line begins and ends at its ends
    assert torch.equal(on_line(x_top, x_b, window.t_b, window), x_b)
    torch.testing.assert_close(on_line(x_top, x_b, window.t_top, window), x_top)


def test_its_noise_is_the_one_whose_single_ddim_step_crosses_the_window():
    x_top, x_b = draws(4, 2)
    window = windows_of(torch.tensor([1000, 750, 500, 250]), 1000, 4)
    eps = line_eps(SCHEDULE, x_top, x_b, window)
    alpha, sigma = SCHEDULE.at(window.t_top, 4, torch.float64)
    there = jump(SCHEDULE, Prediction((x_top - sigma * eps) / alpha, eps), window.t_b)
    torch.testing.assert_close(there, x_b, rtol=1e-9, atol=1e-9)


def test_on_a_point_mass_it_is_the_noise_itself():
    """There the ODE keeps eps: x_t = alpha_t c + sigma_t eps at both ends of every window."""
    c, eps = draws(4, 2)
    window = windows_of(torch.tensor([1000, 750, 500, 250]), 1000, 4)
    ends = [add_noise(SCHEDULE, c, eps, t) for t in (window.t_top, window.t_b)]
    torch.testing.assert_close(line_eps(SCHEDULE, *ends, window), eps, rtol=1e-8, atol=1e-8)


def lines_of_the_gaussian(k: int):
    """The network that knows every window's line of N(m, s^2): its ends are the ODE's."""

    def denoiser(x_t, t):
        window = windows_of(t, 1000, k)
        zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
        # x_b = g x_top + c, so x_t = (1 - s) x_b + s x_top is affine in x_top too
        c = gaussian_flow(SCHEDULE, zero, window.t_top, window.t_b)
        g = gaussian_flow(SCHEDULE, one, window.t_top, window.t_b) - c
        s = window.share(t, x_t)
        x_top = (x_t - (1 - s) * c) / ((1 - s) * g + s)
        eps = line_eps(SCHEDULE, x_top, g * x_top + c, window)
        return Prediction(x_t * float("nan"), eps)

    return denoiser


@pytest.mark.parametrize(("k", "steps"), [(4, 4), (4, 8), (4, 40), (2, 6), (1, 1)])
def test_its_sampler_follows_the_ode_exactly_at_the_edges(k, steps):
    (x,) = draws(3, 1)
    exact = gaussian_flow(SCHEDULE, x, full(3, 1000), full(3, 0))
    there = straight_sample(SCHEDULE, lines_of_the_gaussian(k), x, edges(1000, steps)[::-1], k)
    torch.testing.assert_close(there, exact, rtol=1e-7, atol=1e-7)


def test_at_the_edges_it_is_ddim():
    (x,) = draws(3, 1)

    def network(x_t, t):
        alpha, sigma = SCHEDULE.at(t, x_t.ndim, x_t.dtype)
        eps = torch.tanh(x_t + t.view(-1, 1, 1, 1) / 500)
        return Prediction((x_t - sigma * eps) / alpha, eps)

    there = straight_sample(SCHEDULE, network, x, [1000, 750, 500, 250, 0], 4)
    for t in (1000, 750, 500, 250):
        x = ddim_step(SCHEDULE, network, x, full(3, t), full(3, t - 250))
    torch.testing.assert_close(there, x, rtol=1e-9, atol=1e-9)


def test_a_step_across_an_edge_is_refused():
    with pytest.raises(ValueError, match=r"edges \[250, 750\] of k=4"):
        straight_sample(SCHEDULE, lines_of_the_gaussian(4), draws(1, 1)[0], [1000, 500, 0], 4)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_starts_at_the_edges_are_all_and_only_those(k):
    times = sample_times(4000, 1000, 40, k, "segment_start", torch.Generator().manual_seed(0), "cpu", "edges")
    counts = {t: int((times.t_n == t).sum()) for t in edges(1000, k)[1:]}
    assert sum(counts.values()) == 4000
    # each with 1/k: four deviations of a binomial
    assert all(abs(n - 4000 / k) <= 4 * (4000 / k) ** 0.5 for n in counts.values())
    assert torch.equal(times.t_prev, times.t_n - 25)
    with pytest.raises(ValueError, match="start_rule='top'"):
        sample_times(4, 1000, 40, k, "uniform", torch.Generator(), "cpu", "top")


def test_a_solver_walks_the_grid_down_to_the_end_and_stays():
    times = sample_times(500, 1000, 40, 4, "uniform", torch.Generator().manual_seed(1), "cpu")
    way = torch.stack(solver_times(times, 1000, 40, 10), dim=1).tolist()
    points = set(grid(1000, 40))
    for row, t_n, t_end in zip(way, times.t_n.tolist(), times.t_end.tolist(), strict=True):
        assert (row[0], row[-1]) == (t_n, t_end)
        assert set(row) - {t_end} <= points
        assert all(a - b in (0, 25) or b == t_end for a, b in zip(row, row[1:], strict=False))
    one = Times(*(torch.tensor([t]) for t in (100, 75, 30, 0)))
    assert [int(t) for t in solver_times(one, 1000, 40, 4)] == [100, 75, 50, 30, 30]
