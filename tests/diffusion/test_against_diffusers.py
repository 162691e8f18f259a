"""Our samplers against diffusers' on a toy epsilon network: same table, same network, same numbers."""

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from hypersd_ray.diffusion.parameterization import to_prediction
from hypersd_ray.diffusion.schedule import Schedule, from_alphas_cumprod
from hypersd_ray.diffusion.segments import edges
from hypersd_ray.diffusion.solver import consistency_sample, ode_solve

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x, index):
    """A smooth toy epsilon network of x and diffusers' index i = t - 1."""
    return torch.tanh(x * 0.8) * (0.5 + index / 2000) + 0.1 * torch.sin(3 * x)


def denoiser(schedule: Schedule):
    def predict(x_t, t):
        alpha, sigma = schedule.at(t, x_t.ndim, x_t.dtype)
        return to_prediction(network(x_t, (t[0] - 1).item()), x_t, alpha, sigma, "epsilon")

    return predict


def _start():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 20, 50])
def test_ddim_trailing_is_ode_solve_on_the_edges(steps):
    scheduler = DDIMScheduler(**CONFIG, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    # their float32 table in float64, so that only the order of operations may differ
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    schedule = from_alphas_cumprod(scheduler.alphas_cumprod)
    times = edges(1000, steps)[::-1]
    assert [i + 1 for i in scheduler.timesteps.tolist()] == times[:-1]
    x = _start()
    for i in scheduler.timesteps:
        x = scheduler.step(network(x, i.item()), i, x, eta=0.0).prev_sample
    ours = ode_solve(schedule, denoiser(schedule), _start(), times)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(consistency_sample(schedule, denoiser(schedule), _start(), steps), ours)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 0.9])
def test_tcd_interior_steps(eta):
    """Where both reach the same point: t' = floor((1 - eta) t_next) here, floor((1 - eta) (t_next - 1)) + 1 there.

    Equal whenever (1 - eta) t_next is an integer and eta < 1. Two ends cannot agree, by their convention of no t = 0:
    eta = 1 goes through their index 0 = our t = 1, and so does their last step.
    """
    scheduler = TCDScheduler(**CONFIG)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = from_alphas_cumprod(scheduler.alphas_cumprod)
    times = [1000, 800, 600, 400]
    scheduler.set_timesteps(timesteps=[t - 1 for t in [*times, 200]])
    theirs, generator, predictions = _start(), torch.Generator().manual_seed(7), []
    for i in scheduler.timesteps[: len(times) - 1]:
        step = scheduler.step(network(theirs, i.item()), i.item(), theirs, eta=eta, generator=generator)
        theirs = step.prev_sample
        predictions.append(step.pred_noised_sample)
    generator = torch.Generator().manual_seed(7)
    ours = consistency_sample(schedule, denoiser(schedule), _start(), len(times) - 1, eta, generator, times)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    if eta > 0:
        assert not torch.allclose(predictions[-1], theirs), "the noise was drawn"


def test_tcd_ends_one_step_short_of_us():
    """Their last step lands on index 0, our t = 1; ours on clean data. One step from T shows both."""
    scheduler = TCDScheduler(**CONFIG)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(1)
    schedule = from_alphas_cumprod(scheduler.alphas_cumprod)
    theirs = scheduler.step(network(_start(), 999), 999, _start(), eta=0.0).prev_sample
    at_one = ode_solve(schedule, denoiser(schedule), _start(), [1000, 1])
    at_zero = ode_solve(schedule, denoiser(schedule), _start(), [1000, 0])
    torch.testing.assert_close(theirs, at_one, rtol=1e-8, atol=1e-8)
    # sigma_1 = sqrt(0.00085) = 0.029 of noise is left in theirs
    assert (theirs - at_zero).abs().max().item() == pytest.approx(0.029, abs=0.02)
