"""Adversarial losses in closed form."""

import math

import pytest
import torch

from hypersd_ray.losses.adversarial import discriminator_loss, generator_loss

KINDS = ["hinge", "non_saturating", "wasserstein"]


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    "kind, discriminator, generator",
    [
        # real = 0.5, fake = -0.25: relu(1 - 0.5) + relu(1 - 0.25) = 0.5 + 0.75; -fake = 0.25
        ("hinge", 1.25, 0.25),
        ("non_saturating", softplus(-0.5) + softplus(-0.25), softplus(0.25)),
        # Eq. 9: fake - real = -0.75; Eq. 8: -fake
        ("wasserstein", -0.75, 0.25),
    ],
)
def test_values(kind, discriminator, generator):
    real, fake = [torch.full((2, 1, 3, 3), 0.5)], [torch.full((2, 1, 3, 3), -0.25)]
    assert discriminator_loss(real, fake, kind).tolist() == pytest.approx([discriminator] * 2)
    assert generator_loss(fake, kind).tolist() == pytest.approx([generator] * 2)


def test_hinge_is_flat_beyond_its_margins():
    assert discriminator_loss([torch.tensor([1.5])], [torch.tensor([-2.0])], "hinge").item() == 0.0


def test_undecided_discriminator():
    """At logits 0 the non-saturating discriminator pays 2 log 2, its ceiling while both sides look the same; hinge pays 2."""
    zero = [torch.zeros(1, 1, 2, 2)]
    assert discriminator_loss(zero, zero, "non_saturating").item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(zero, zero, "hinge").item() == 2.0
    assert discriminator_loss(zero, zero, "wasserstein").item() == 0.0


def test_heads_weigh_the_same_and_samples_stay_apart():
    # the large map's mean per sample is (1, 3), the small one's (3, 5); the mean over heads is (2, 4)
    fake = [
        torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8),
        torch.tensor([3.0, 5.0]).view(2, 1, 1, 1),
    ]
    assert generator_loss(fake, "wasserstein").tolist() == [-2.0, -4.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_sides_pull_apart(kind):
    """The generator gains by raising the fake logit, the discriminator by lowering it and raising the real."""
    real, fake = torch.zeros(3, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    (g,) = torch.autograd.grad(generator_loss([fake], kind).sum(), fake)
    d_real, d_fake = torch.autograd.grad(discriminator_loss([real], [fake], kind).sum(), (real, fake))
    assert (g < 0).all() and (d_real < 0).all() and (d_fake > 0).all()


def test_half_precision_logits_are_judged_in_float32():
    logits = [torch.full((1, 1, 64, 64), 0.1, dtype=torch.bfloat16)]
    assert generator_loss(logits, "non_saturating").dtype == torch.float32


def test_refusals():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="'lsgan'"):
        generator_loss([one], "lsgan")
    with pytest.raises(ValueError, match="'lsgan'"):
        discriminator_loss([one], [one], "lsgan")
    with pytest.raises(ValueError, match="pair"):
        discriminator_loss([one, one], [one], "hinge")
    with pytest.raises(ValueError, match="at least one head"):
        generator_loss([], "hinge")
