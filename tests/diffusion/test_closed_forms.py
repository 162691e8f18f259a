"""The solver and the TSCD loss on data whose probability flow ODE is known.

Point mass at c: the exact denoiser says x0 = c, eps is constant along a trajectory, one jump is exact.

Gaussian N(m, s^2): x_t ~ N(alpha_t m, v_t), v_t = alpha_t^2 s^2 + sigma_t^2. The ODE is linear and carries each
marginal into the next, so the standardised point (x_t - alpha_t m) / sqrt(v_t) is constant along it. The exact
denoiser is E[x0 | x_t] = m + alpha_t s^2 / v_t * (x_t - alpha_t m), E[eps | x_t] = sigma_t / v_t * (x_t - alpha_t m).
"""

import math

import pytest
import torch

from hypersd_ray.diffusion.parameterization import Prediction
from hypersd_ray.diffusion.schedule import Schedule, add_noise, cosine, flow, scaled_linear
from hypersd_ray.diffusion.segments import grid, sample_times
from hypersd_ray.diffusion.solver import consistency_sample, ddim_step, jump, ode_solve
from hypersd_ray.losses.consistency import loss_tscd

M, S = 0.7, 0.4
SCHEDULES = {"scaled_linear": scaled_linear(), "cosine": cosine(), "flow": flow()}


def point_mass(schedule: Schedule, c: torch.Tensor):
    def denoiser(x_t, t):
        alpha, sigma = schedule.at(t, x_t.ndim, x_t.dtype)
        return Prediction(c.expand_as(x_t), (x_t - alpha * c) / sigma)

    return denoiser


def _moments(schedule, x_t, t):
    alpha, sigma = schedule.at(t, x_t.ndim, x_t.dtype)
    return alpha, sigma, alpha**2 * S**2 + sigma**2


def gaussian(schedule: Schedule):
    def denoiser(x_t, t):
        alpha, sigma, v = _moments(schedule, x_t, t)
        centred = x_t - alpha * M
        return Prediction(M + alpha * S**2 / v * centred, sigma / v * centred)

    return denoiser


def gaussian_flow(schedule, x_t, t, t_end):
    """The exact consistency map: the standardised point is constant."""
    alpha, _, v = _moments(schedule, x_t, t)
    alpha_end, _, v_end = _moments(schedule, x_t, t_end)
    return alpha_end * M + (v_end / v).sqrt() * (x_t - alpha * M)


def _latents(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("k, N", [(8, 8), (8, 48), (4, 40), (2, 50), (1, 50), (1, 1000)])
def test_tscd_loss_of_the_exact_map_is_zero_on_a_point_mass(schedule, k, N):
    noise, _ = _latents(32)
    c = noise[:1]
    denoiser = point_mass(schedule, c)
    for rule in ("uniform", "segment_start", "previous", "two_steps"):
        times = sample_times(32, 1000, N, k, rule, torch.Generator().manual_seed(1), "cpu")
        x_n = add_noise(schedule, c.expand_as(noise), noise, times.t_n)
        x_prev = ddim_step(schedule, denoiser, x_n, times.t_n, times.t_prev)
        student = ddim_step(schedule, denoiser, x_n, times.t_n, times.t_end)
        target = ddim_step(schedule, denoiser, x_prev, times.t_prev, times.t_end)
        assert torch.isfinite(target).all()
        assert loss_tscd(student, target).max().item() < 1e-20
        # the loss is no constant: a student that lies elsewhere is not at zero
        assert loss_tscd(student + 0.1, target).min().item() == pytest.approx(0.01, rel=1e-6)


def test_one_jump_reaches_any_time_on_a_point_mass():
    schedule = scaled_linear()
    noise, _ = _latents(4)
    c = noise[:1] + 1
    t = torch.tensor([1000, 700, 300, 1])
    x_t = add_noise(schedule, c.expand_as(noise), noise, t)
    for t_end in (torch.tensor([0, 699, 20, 0]), torch.zeros(4, dtype=torch.long)):
        expected = add_noise(schedule, c.expand_as(noise), noise, t_end)
        x_end = jump(schedule, point_mass(schedule, c)(x_t, t), t_end)
        torch.testing.assert_close(x_end, expected, rtol=1e-10, atol=1e-10)


def test_a_step_to_where_we_are_is_the_identity():
    schedule = scaled_linear()
    x = _latents(4)[0].float()
    t = torch.tensor([0, 1, 500, 1000])

    def nonsense(x_t, t):
        assert t.min() >= 1, "a network knows no t = 0"
        return Prediction(x_t * float("nan"), x_t * float("nan"))

    assert torch.equal(ddim_step(schedule, nonsense, x, t, t), x)
    moved = ddim_step(schedule, gaussian(schedule), x, t, torch.zeros_like(t))
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])


def test_the_gaussian_flow_is_the_limit_of_ddim():
    """One thousand steps agree with the closed form, fifty less so; this ties the formula to the solver."""
    schedule = flow()
    x_T, _ = _latents(8)
    T, zero = torch.full((8,), 1000), torch.zeros(8, dtype=torch.long)
    exact = gaussian_flow(schedule, x_T, T, zero)
    error = {
        N: (ode_solve(schedule, gaussian(schedule), x_T, grid(1000, N)[::-1]) - exact).abs().max().item()
        for N in (50, 100, 1000)
    }
    assert error[1000] < 3e-3
    # first order: ten times the steps, a tenth of the error
    assert error[100] / error[1000] == pytest.approx(10, rel=0.15)
    assert error[50] / error[100] == pytest.approx(2, rel=0.15)


def test_ode_solve_may_end_anywhere():
    schedule = flow()
    x_T, _ = _latents(8)
    end = ode_solve(schedule, gaussian(schedule), x_T, list(range(1000, 399, -1)))
    exact = gaussian_flow(schedule, x_T, torch.full((8,), 1000), torch.full((8,), 400))
    torch.testing.assert_close(end, exact, rtol=0, atol=3e-3)
    assert torch.equal(ode_solve(schedule, gaussian(schedule), x_T, [400]), x_T)


def _summed_error(schedule, N, above):
    """Sum over the grid from `above` to T of sqrt(TSCD loss) of the exact consistency map, on one trajectory."""
    points = torch.tensor([t for t in grid(1000, N) if t >= above])
    t_n, t_prev = points[1:], points[:-1]
    noise, data = _latents(1)
    x_T = add_noise(schedule, M + S * data, noise, torch.tensor([1000]))
    x_n = gaussian_flow(schedule, x_T.expand(len(t_n), -1, -1, -1), torch.full_like(t_n, 1000), t_n)
    x_prev = ddim_step(schedule, gaussian(schedule), x_n, t_n, t_prev)
    t_end = torch.zeros_like(t_n)
    student = gaussian_flow(schedule, x_n, t_n, t_end)
    target = gaussian_flow(schedule, x_prev, t_prev, t_end)
    return loss_tscd(student, target).sqrt().sum().item()


@pytest.mark.parametrize("name, above", [("flow", 0), ("cosine", 0), ("scaled_linear", 200)])
def test_loss_of_the_exact_map_falls_with_the_step_at_first_order(name, above):
    """DDIM's one-step error is O(s^2); T/s of them sum to O(s): slope 1 in log-log.

    It needs sigma smooth in t. A linear beta has sigma ~ sqrt(t) at 0, so its steps near 0 cost s^2/t each, which sums
    to s log N and a slope below 1 there (the next test); away from 0 it is 1 as well.
    """
    errors = [_summed_error(SCHEDULES[name], N, above) for N in (50, 100, 200)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([1.0, 1.0], abs=0.05)


def test_linear_betas_lose_a_logarithm_near_clean_data():
    """SD's schedule over all of 0..T: slope below 1, since error / s grows with log N; each doubling adds as much."""
    scaled = [_summed_error(SCHEDULES["scaled_linear"], N, 0) * N for N in (25, 50, 100, 200)]
    growth = [b - a for a, b in zip(scaled, scaled[1:], strict=False)]
    assert min(growth) > 0
    assert growth[1:] == pytest.approx(growth[:-1], rel=0.2)


def test_losses_do_not_follow_the_target():
    student = torch.ones(2, 3, requires_grad=True)
    target = torch.zeros(2, 3, requires_grad=True)
    loss_tscd(student, target).sum().backward()
    assert target.grad is None
    # d/dx mean over 3 of x^2 = 2 x / 3
    torch.testing.assert_close(student.grad, torch.full((2, 3), 2 / 3))
    far = loss_tscd(student, target, distance=lambda a, b: (a - b).abs().flatten(1).sum(1))
    assert far.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling_a_point_mass_lands_on_it(eta, steps):
    schedule = scaled_linear()
    x_T, other = _latents(4)
    c = other[:1]
    x = consistency_sample(schedule, point_mass(schedule, c), x_T, steps, eta, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, c.expand_as(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_exact_consistency_model_keeps_the_marginal_for_every_eta(eta):
    """Renoising must carry N(m, s^2)'s marginal at t' to that at t: the samples have the data's mean and deviation."""
    schedule = scaled_linear()

    def exact(x_t, t):
        # the only two predictions that DDIM maps onto the flow at t' and leave x_t on it: solve the 2x2 system
        alpha, sigma = schedule.at(t, x_t.ndim, x_t.dtype)
        low = torch.full_like(t, math.floor((1 - eta) * targets[t[0].item()]))
        alpha_s, sigma_s = schedule.at(low, x_t.ndim, x_t.dtype)
        x_s = gaussian_flow(schedule, x_t, t, low)
        det = alpha * sigma_s - alpha_s * sigma
        return Prediction((sigma_s * x_t - sigma * x_s) / det, (alpha * x_s - alpha_s * x_t) / det)

    targets = {1000: 750, 750: 500, 500: 250, 250: 0}
    g = torch.Generator().manual_seed(0)
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    x_T = alpha * M + (alpha**2 * S**2 + sigma**2).sqrt() * torch.randn(40_000, 1, generator=g, dtype=torch.float64)
    x = consistency_sample(schedule, exact, x_T, 4, eta, g)
    # 40000 draws: the mean within 4 * 0.4 / 200 = 0.008, the deviation within 4 * 0.4 / sqrt(80000) = 0.0057
    assert x.mean().item() == pytest.approx(M, abs=0.008)
    assert x.std().item() == pytest.approx(S, abs=0.0057)


def test_sampler_refusals():
    schedule, x = scaled_linear(), torch.zeros(1, 1)
    d = gaussian(schedule)
    for call, message in [
        (lambda: consistency_sample(schedule, d, x, 4, eta=1.5, generator=torch.Generator()), "eta=1.5"),
        (lambda: consistency_sample(schedule, d, x, 4, eta=0.5), "generator"),
        (lambda: consistency_sample(schedule, d, x, 2, times=[1000, 0]), "steps=2"),
        (lambda: consistency_sample(schedule, d, x, 0), "k=0"),
        (lambda: ode_solve(schedule, d, x, [500, 500, 0]), "fall strictly"),
        (lambda: ode_solve(schedule, d, x, [1001, 0]), "1000..0"),
        (lambda: ode_solve(schedule, d, x, []), "fall strictly"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
