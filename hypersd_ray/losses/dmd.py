"""Score distillation: distribution matching (Eq. 10), with the fake score's own loss, and Turbo's distance.

The gradient of D_KL(fake || real) with respect to a generated x is the difference of two scores at a noised x_t. With
x0 the mean that a score stands for, s(x_t) = (alpha_t x0 - x_t) / sigma_t^2, the difference of the scores is the
difference of the two means up to a factor of t, and that is what is written here: the means of the two networks.

Shapes
    x                  (B, ...)   generated clean latents, carry the gradient
    x0_real, x0_fake   (B, ...)   what the guided teacher and the fake score see in x_t, the noised x; detached here
    t                  (B,)       integer times
    result             (B,)       one loss per sample
"""

import torch
from torch import Tensor

from hypersd_ray.losses.distances import mse

LEAST_WEIGHT = 1e-6
"""Where x is the teacher's own x0, the normaliser is 0 and so is what it divides."""


def renoising_times(
    batch: int, T: int, low: float, high: float, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """t (B,) uniform on the integers of [low T, high T], both ends included, within 1..T.

    DMD's range is 0.02..0.98: at its ends the two scores agree or the network was hardly trained. Raises ValueError
    unless 0 <= low < high <= 1. Drawn on the generator's device.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"the re-noising range {low}..{high} must rise within 0..1")
    first, last = max(1, round(low * T)), max(1, round(high * T))
    drawn = torch.randint(first, last + 1, (batch,), generator=generator, device=generator.device)
    return drawn.to(device)


@torch.no_grad()
def dmd_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean|x - x0_real|, the mean over each sample: (B, ...), float32 at least.

    Eq. 10's -(f_real(x) - f_fake(x)) with DMD's normaliser, which keeps its size alike at every t. Raises ValueError
    when the shapes differ.
    """
    if not x.shape == x0_real.shape == x0_fake.shape:
        shapes = ", ".join(str(tuple(a.shape)) for a in (x, x0_real, x0_fake))
        raise ValueError(f"x, x0_real and x0_fake must have one shape, got {shapes}")
    x, x0_real, x0_fake = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (x, x0_real, x0_fake))
    weight = (x - x0_real).flatten(1).abs().mean(dim=1).clamp(min=LEAST_WEIGHT)
    return (x0_fake - x0_real) / weight.view((-1,) + (1,) * (x.ndim - 1))


# Eq. 10
def dmd_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A loss whose gradient in x is `dmd_gradient` / (elements of a sample): (B,).

    Half the mean squared distance to a pseudo-target x - gradient, which is held fixed. Its value is half the mean
    square of the gradient, not the divergence, and says little. Raises ValueError when the shapes differ.
    """
    target = x.detach() - dmd_gradient(x, x0_real, x0_fake)
    return 0.5 * mse(x, target)


# ADD, the paper's [21]: its distillation loss with d the squared distance and c(t) = alpha_t
def score_distillation_loss(x: Tensor, x0_real: Tensor, alpha_t: Tensor) -> Tensor:
    """alpha_t mean (x - x0_real)^2 per sample, x0_real held fixed: (B,). alpha_t has B elements.

    Its gradient in x is 2 alpha_t (x - x0_real) / (elements of a sample): score distillation sampling without a fake
    score, weighing less what the teacher saw through more noise. Raises ValueError when the shapes differ.
    """
    return alpha_t.flatten() * mse(x, x0_real.detach())


# Ho et al. (the paper's [3]): the fake distribution's score by denoising
def fake_score_loss(eps_fake: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the noise that the fake score sees in a noised generated sample: (B, ...) -> (B,).

    Over all t, without guidance. Raises ValueError when the shapes differ.
    """
    return mse(eps_fake, eps.detach())
