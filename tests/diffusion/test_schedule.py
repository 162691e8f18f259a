"""Schedules against diffusers' tables, and the forward process."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from hypersd_ray.diffusion import schedule as S

SD_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
}


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize(
    "name, ours",
    [("scaled_linear", S.scaled_linear), ("linear", S.linear), ("squaredcos_cap_v2", S.cosine)],
)
def test_alphas_cumprod_are_those_of_diffusers(scheduler_class, name, ours):
    betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}.get(name, (1e-4, 0.02))
    theirs = scheduler_class(beta_schedule=name, beta_start=betas[0], beta_end=betas[1])
    acp = theirs.alphas_cumprod.double()
    # theirs is a float32 product of up to 1000 factors: 1000 * 6e-8 = 6e-5 at worst
    torch.testing.assert_close(ours().alpha[1:] ** 2, acp, rtol=6e-5, atol=0)
    config = S.from_scheduler_config(dict(theirs.config))
    assert torch.equal(config.alpha, ours().alpha)
    torch.testing.assert_close(S.from_alphas_cumprod(theirs.alphas_cumprod).alpha[1:] ** 2, acp, rtol=1e-12, atol=0)


def test_terminal_signal_of_stable_diffusion():
    # sqrt(alphas_cumprod[999]) = 0.068, so x0 grows 14.6 times at 999 and 5.1 times at 800
    schedule = S.scaled_linear()
    assert schedule.alpha[1000].item() == pytest.approx(0.068, abs=5e-4)
    amplification = schedule.sigma / schedule.alpha
    assert amplification[1000].item() == pytest.approx(14.6, abs=0.05)
    assert amplification[801].item() == pytest.approx(5.1, abs=0.05)


@pytest.mark.parametrize("schedule", [S.scaled_linear(), S.linear(), S.cosine(), S.flow()])
def test_ends_and_monotony(schedule):
    assert schedule.T == 1000
    assert (schedule.alpha[0].item(), schedule.sigma[0].item()) == (1.0, 0.0)
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()


def test_flow_is_the_straight_line():
    schedule = S.flow(8)
    assert schedule.alpha.tolist() == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert torch.equal(schedule.alpha + schedule.sigma, torch.ones(9, dtype=torch.float64))


def test_at_gathers_shapes_and_rounds_once():
    schedule = S.scaled_linear()
    alpha, sigma = schedule.at(torch.tensor([0, 1000], dtype=torch.int32))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1) and alpha.dtype == torch.float32
    assert alpha[1].item() == schedule.alpha[1000].float().item()
    assert schedule.at(torch.tensor([5]), ndim=2, dtype=torch.float64)[0].shape == (1, 1)
    assert schedule.to("cpu").at(torch.tensor([5]), 1, torch.float64)[1].item() == schedule.sigma[5].item()


@pytest.mark.parametrize("t", [-1, 1001])
def test_at_refuses_times_outside_the_table(t):
    with pytest.raises(IndexError):
        S.scaled_linear().at(torch.tensor([t]))


def test_at_refuses_real_times():
    with pytest.raises(ValueError, match="integer"):
        S.scaled_linear().at(torch.tensor([0.5]))


def test_zero_terminal_snr_is_refused_with_epsilon_and_exact_with_v():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        S.from_scheduler_config({**SD_CONFIG, "rescale_betas_zero_snr": True})
    ours = S.from_scheduler_config({**SD_CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    theirs = DDIMScheduler(
        **SD_CONFIG, rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False
    ).alphas_cumprod.double()
    assert ours.alpha[1000] == 0
    torch.testing.assert_close(ours.alpha[1:] ** 2, theirs, rtol=1e-3, atol=1e-6)


def test_trained_betas_win():
    # alpha^2: 1, 0.9, 0.9 * 0.8 = 0.72
    schedule = S.from_scheduler_config({**SD_CONFIG, "trained_betas": [0.1, 0.2]})
    torch.testing.assert_close(schedule.alpha**2, torch.tensor([1, 0.9, 0.72], dtype=torch.float64))


@pytest.mark.parametrize(
    "config, message",
    [({**SD_CONFIG, "beta_schedule": "sigmoid"}, "sigmoid"), ({"num_train_timesteps": 10}, "beta_schedule")],
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        S.from_scheduler_config(config)


def test_broken_tables_are_refused():
    with pytest.raises(ValueError, match="strictly"):
        S.from_alphas_cumprod(torch.tensor([0.9, 0.95]))
    with pytest.raises(ValueError, match="float64"):
        S.Schedule(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="clean data"):
        S.Schedule(torch.tensor([0.9, 0.5]).double(), torch.tensor([0.0, 0.5]).double())


def test_add_noise_is_that_of_diffusers():
    theirs = DDPMScheduler(**SD_CONFIG)
    schedule = S.from_alphas_cumprod(theirs.alphas_cumprod)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    t = torch.tensor([1, 500, 1000])
    torch.testing.assert_close(S.add_noise(schedule, x0, eps, t), theirs.add_noise(x0, eps, t - 1))
    assert torch.equal(S.add_noise(schedule, x0, eps, torch.zeros(3, dtype=torch.long)), x0)


@pytest.mark.parametrize("schedule", [S.scaled_linear(), S.flow()])
def test_renoise_composes(schedule):
    """s -> u -> t has the law of s -> t: noise coefficients add in squares; and 0 -> t is add_noise."""
    one = torch.ones(1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)

    def coefficients(s, t):
        s, t = torch.tensor([s]), torch.tensor([t])
        return S.renoise(schedule, one, s, t, zero).item(), S.renoise(schedule, zero, s, t, one).item()

    for s, u, t in [(0, 300, 1000), (10, 20, 30), (499, 500, 999), (0, 1, 2)]:
        (a1, b1), (a2, b2), (a, b) = coefficients(s, u), coefficients(u, t), coefficients(s, t)
        assert a1 * a2 == pytest.approx(a, abs=1e-12)
        assert math.hypot(a2 * b1, b2) == pytest.approx(b, rel=1e-9)
    assert coefficients(0, 700) == pytest.approx((schedule.alpha[700].item(), schedule.sigma[700].item()))


@pytest.mark.parametrize("schedule", [S.scaled_linear(), S.flow()])
def test_renoise_from_a_time_to_itself_is_the_identity(schedule):
    x, noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.full((3, 2), 7.0)
    t = torch.tensor([0, 40, 1000])  # flow: alpha_T = 0, so the ratio alone would be 0/0
    assert torch.equal(S.renoise(schedule, x, t, t, noise), x)


def test_half_precision_latents_are_noised_in_float32():
    x0 = torch.ones(1, 1, dtype=torch.bfloat16)
    t = torch.tensor([1])
    noised = S.add_noise(S.scaled_linear(), x0, torch.zeros_like(x0), t)
    # sqrt(1 - 0.00085) = 0.999575; bfloat16 would round it to 1
    assert noised.item() == pytest.approx(0.999575, abs=1e-6)
