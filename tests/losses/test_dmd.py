"""Distribution matching against closed forms: for Gaussians both scores are known, and where the generator must go."""

from __future__ import annotations

import pytest
import torch

from hypersd_ray.diffusion.schedule import add_noise, scaled_linear
from hypersd_ray.losses.dmd import (
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    renoising_times,
    score_distillation_loss,
)

SCHEDULE = scaled_linear()


def posterior_x0(x_t: torch.Tensor, t: torch.Tensor, mean, std) -> torch.Tensor:
    """E[x0 | x_t] of x0 ~ N(mean, std^2): the perfect denoiser of a Gaussian."""
    alpha, sigma = SCHEDULE.at(t, x_t.ndim, torch.float64)
    return mean + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


def score(x_t: torch.Tensor, t: torch.Tensor, mean, std) -> torch.Tensor:
    """d log p_t / d x_t of the same Gaussian, noised."""
    alpha, sigma = SCHEDULE.at(t, x_t.ndim, torch.float64)
    return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def draw(batch: int, generator: torch.Generator, low: float = 0.02, high: float = 0.98):
    """z, eps (B, 4) float64 and t (B,)."""
    z, eps = (torch.randn(batch, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, eps, renoising_times(batch, SCHEDULE.T, low, high, generator, "cpu")


def test_the_losss_gradient_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5, 6)
    x, real, fake = (torch.randn(shape, generator=generator) for _ in range(3))
    x.requires_grad_(True)
    loss = dmd_loss(x, real, fake)
    loss.sum().backward()
    for b in range(3):
        weight = (x[b] - real[b]).abs().mean()
        torch.testing.assert_close(x.grad[b], (fake[b] - real[b]) / weight / (4 * 5 * 6))
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, 0.5 * dmd_gradient(x, real, fake).square().flatten(1).mean(1))


def test_the_difference_of_means_is_the_difference_of_scores():
    # s = (alpha x0 - x_t) / sigma^2, so s_fake - s_real = alpha / sigma^2 (x0_fake - x0_real): Eq. 10 up to a factor of t
    _, x_t, t = draw(64, torch.Generator().manual_seed(1))
    alpha, sigma = SCHEDULE.at(t, 2, torch.float64)
    means = posterior_x0(x_t, t, -1.0, 0.5) - posterior_x0(x_t, t, 2.0, 0.7)
    scores = score(x_t, t, -1.0, 0.5) - score(x_t, t, 2.0, 0.7)
    torch.testing.assert_close(alpha / sigma**2 * means, scores, rtol=1e-9, atol=1e-9)


def test_the_expected_gradient_is_that_of_the_divergence():
    # Without the normaliser, E_x,eps of (s_fake - s_real) dx/dm is d/dm KL(q_t || p_t) / alpha; here in closed form.
    generator, t = torch.Generator().manual_seed(2), 400
    (m, s), (mu, std) = (0.8, 0.6), (-0.4, 1.1)
    z, eps, _ = draw(400_000, generator)
    times = torch.full((len(z),), t)
    alpha, sigma = (float(a) for a in (SCHEDULE.alpha[t], SCHEDULE.sigma[t]))
    x = m + s * z
    x_t = add_noise(SCHEDULE, x, eps, times)
    real, fake = posterior_x0(x_t, times, mu, std), posterior_x0(x_t, times, m, s)
    weight = (x - real).abs().mean(dim=1, keepdim=True)
    along_score = alpha / sigma**2 * weight * dmd_gradient(x, real, fake)
    q_var, p_var = alpha**2 * s**2 + sigma**2, alpha**2 * std**2 + sigma**2
    d_mean = alpha * (m - mu) / p_var  # 1/alpha d/dm KL of two Gaussians of variances q_var, p_var
    d_std = alpha * s * (1 / p_var - 1 / q_var)  # 1/alpha d/ds
    assert along_score.mean().item() == pytest.approx(d_mean, abs=0.01)
    assert (along_score * z).mean().item() == pytest.approx(d_std, abs=0.01)


def descend(mean, log_std, loss_of, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam([mean, log_std], lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()


def parameters(mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.full((4,), mean, dtype=torch.float64, requires_grad=True)
    return wide, torch.full((4,), std, dtype=torch.float64).log().requires_grad_(True)


def test_a_generator_with_known_scores_becomes_the_real_distribution():
    real_mean, real_std = torch.tensor([1.5, -1, 0, 0.5]).double(), torch.tensor([0.5, 1, 1.5, 0.8]).double()
    mean, log_std = parameters(0.0, 0.3)
    generator = torch.Generator().manual_seed(3)

    def loss(_: int) -> torch.Tensor:
        z, eps, t = draw(256, generator)
        x = mean + log_std.exp() * z
        x_t = add_noise(SCHEDULE, x.detach(), eps, t)
        real = posterior_x0(x_t, t, real_mean, real_std)
        fake = posterior_x0(x_t, t, mean.detach(), log_std.exp().detach())
        return dmd_loss(x, real, fake).mean()

    descend(mean, log_std, loss, steps=800, lr=0.03)
    torch.testing.assert_close(mean.detach(), real_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(log_std.exp().detach(), real_std, rtol=0.05, atol=0.03)


def test_a_learned_fake_score_follows_the_generator_there():
    # The whole game: the fake score knows the generator by its denoising loss alone, in several updates a step.
    mean, log_std = parameters(0.0, 0.4)
    fake_mean, fake_log_std = parameters(-1.0, 1.0)
    fake_optimizer = torch.optim.Adam([fake_mean, fake_log_std], lr=0.05)
    generator = torch.Generator().manual_seed(4)

    def loss(step: int) -> torch.Tensor:
        fake_optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        for _ in range(5):
            z, eps, t = draw(256, generator, 0, 1)
            x = (mean + log_std.exp() * z).detach()
            x_t = add_noise(SCHEDULE, x, eps, t)
            alpha, sigma = SCHEDULE.at(t, 2, torch.float64)
            seen = (x_t - alpha * posterior_x0(x_t, t, fake_mean, fake_log_std.exp())) / sigma
            fake_optimizer.zero_grad()
            fake_score_loss(seen, eps).mean().backward()
            fake_optimizer.step()
        z, eps, t = draw(256, generator)
        x = mean + log_std.exp() * z
        x_t = add_noise(SCHEDULE, x.detach(), eps, t)
        fake = posterior_x0(x_t, t, fake_mean, fake_log_std.exp())
        return dmd_loss(x, posterior_x0(x_t, t, 1.0, 0.8), fake).mean()

    descend(mean, log_std, loss, steps=400, lr=0.03)
    torch.testing.assert_close(mean.detach(), torch.ones(4).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(log_std.exp().detach(), torch.full((4,), 0.8).double(), rtol=0.1, atol=0)
    torch.testing.assert_close(fake_mean.detach(), mean.detach(), rtol=0, atol=0.1)


def test_turbos_gradient_on_a_gaussian():
    """x_t = alpha x + sigma eps, E[x0 | x_t] = mu + k (x_t - alpha mu) with k = alpha s^2 / v: over the noise the gradient
    2 alpha (x - E[x0 | x_t]) is 2 alpha (1 - alpha k) (x - mu) = 2 alpha sigma^2 / v (x - mu)."""
    (mu, std), rows = (0.5, 0.8), 200_000
    for t in (100, 500, 900):
        times = torch.full((rows,), t)
        x = torch.full((rows, 1), 2.0, dtype=torch.float64, requires_grad=True)
        eps = torch.randn(rows, 1, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        x_t = add_noise(SCHEDULE, x.detach(), eps, times)
        alpha, sigma = SCHEDULE.at(times, 2, torch.float64)
        loss = score_distillation_loss(x, posterior_x0(x_t, times, mu, std), alpha)
        assert loss.shape == (rows,)
        loss.sum().backward()
        a, s = float(alpha[0]), float(sigma[0])
        expected = 2 * a * s**2 / (a**2 * std**2 + s**2) * (2.0 - mu)
        assert x.grad.mean().item() == pytest.approx(expected, abs=0.005)


def test_score_distillation_without_a_fake_score_seeks_the_mode():
    """The same pull on every sample: a generator ends at the mean, with no width, where distribution matching keeps it."""
    mean, log_std = parameters(0.0, 0.8)
    generator = torch.Generator().manual_seed(6)

    def loss(_: int) -> torch.Tensor:
        z, eps, t = draw(256, generator)
        x = mean + log_std.exp() * z
        seen = posterior_x0(add_noise(SCHEDULE, x.detach(), eps, t), t, 1.0, 0.8)
        return score_distillation_loss(x, seen, SCHEDULE.at(t, 2, torch.float64)[0]).mean()

    descend(mean, log_std, loss, steps=400, lr=0.05)
    torch.testing.assert_close(mean.detach(), torch.ones(4).double(), rtol=0, atol=0.05)
    assert log_std.exp().max().item() < 0.1


def test_nothing_moves_when_the_two_scores_agree():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    seen = torch.randn(2, 4, 8, 8)
    dmd_loss(x, seen, seen).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    dmd_loss(x, x.detach(), x.detach()).sum().backward()  # 0 / 0 is 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_only_x_is_told():
    x, real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    dmd_loss(x, real, fake).sum().backward()
    assert x.grad is not None and real.grad is None and fake.grad is None
    eps_fake, eps = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    fake_score_loss(eps_fake, eps).sum().backward()
    torch.testing.assert_close(eps_fake.grad, 2 * (eps_fake - eps).detach() / 3)
    assert eps.grad is None


def test_half_precision_is_widened():
    x = torch.full((1, 4), 100.0, dtype=torch.bfloat16)
    real = torch.tensor([[100.0, 100.0, 100.0, 99.0]])
    gradient = dmd_gradient(x, real, real + 0.01)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full((1, 4), 0.04), rtol=1e-3, atol=0)


def test_times_cover_their_range():
    times = renoising_times(20_000, 1000, 0.02, 0.98, torch.Generator().manual_seed(0), "cpu")
    assert (times.min().item(), times.max().item()) == (20, 980)
    assert times.float().mean().item() == pytest.approx(500, abs=8)
    assert renoising_times(99, 1000, 0, 1, torch.Generator().manual_seed(0), "cpu").min() >= 1


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.1, 0.5), (0.2, 1.1)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="re-noising range"):
        renoising_times(1, 1000, low, high, torch.Generator(), "cpu")


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        dmd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))
