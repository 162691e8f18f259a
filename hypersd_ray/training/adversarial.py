"""The adversarial part of d in Eq. 14: the target's jump is real, the student's is fake, both noised forward first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_ray.diffusion.schedule import renoise
from hypersd_ray.diffusion.segments import uniform_between
from hypersd_ray.losses.adversarial import AdversarialKind, discriminator_loss, generator_loss
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.discriminator import LatentDiscriminator, features
from hypersd_ray.models.roles import Roles
from hypersd_ray.training.learner import Replicated
from hypersd_ray.training.tscd import Pair


@dataclass(frozen=True)
class Adversary:
    """The discriminator of a stage, and what learns its heads."""

    network: LatentDiscriminator
    learner: Replicated


def adversary_of(network: LatentDiscriminator, lr: float) -> Adversary:
    """`network`, about to learn."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.0, 0.99))
    return Adversary(network, Replicated(dict(network.named_parameters()), optimizer))


def draw_t_star(pair: Pair, generator: torch.Generator) -> Tensor:
    """Where both are judged: uniform on [t_end, t_n] (PCM), at least 1."""
    return uniform_between(pair.times.t_end.clamp(min=1), pair.times.t_n, generator)


def adversarial_losses(
    roles: Roles,
    discriminator: LatentDiscriminator,
    pair: Pair,
    cond: Conditioning,
    kind: AdversarialKind,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(student's loss, discriminator's loss), scalars. A conditional discriminator sees x_{t_n} beside each end.

    The first has gradient in the student only, the second in the heads only: the base's features of the student's
    side are computed once for both.
    """
    t_star = draw_t_star(pair, generator)
    noise = [torch.randn(pair.target.shape, generator=generator).to(pair.target.device) for _ in range(2)]
    fake = features(roles, renoise(roles.schedule, pair.student, pair.times.t_end, t_star, noise[0]), t_star, cond)
    with torch.no_grad():
        real = features(roles, renoise(roles.schedule, pair.target, pair.times.t_end, t_star, noise[1]), t_star, cond)
        origin = features(roles, pair.x_tn, pair.times.t_n, cond) if discriminator.conditional else None
    discriminator.requires_grad_(False)
    student_loss = generator_loss(discriminator.logits(fake, origin), kind).mean()
    discriminator.requires_grad_(True)
    fake_logits = discriminator.logits([f.detach() for f in fake], origin)
    return student_loss, discriminator_loss(discriminator.logits(real, origin), fake_logits, kind).mean()
