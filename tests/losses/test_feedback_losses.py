"""Eq. 11, 12, 15, 16, 17 in numbers."""

import math

import pytest
import torch

from hypersd_ray.losses.feedback import (
    loss_aes,
    loss_drift,
    loss_feedback,
    loss_hinge,
    loss_percep,
    loss_rm,
)


def test_preference_loss_in_numbers():
    """Equal scores: log 2; a lead of 1: log(1 + e^-1); a lead of 100 costs nothing, of -100 costs 100."""
    loss = loss_rm(torch.tensor([0.0, 2.0, 100.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 100.0]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(1 + math.exp(-1)), 0.0, 100.0]))
    with pytest.raises(ValueError, match="must pair"):
        loss_rm(torch.zeros(2), torch.zeros(3))


def test_hinge_in_numbers():
    """alpha 2, scores 1, 3, -1: (1 + 0 + 3) / 3; the second has no gradient."""
    r = torch.tensor([1.0, 3.0, -1.0], requires_grad=True)
    loss = loss_hinge(r, 2.0)
    assert loss.item() == pytest.approx(4 / 3)
    loss.backward()
    torch.testing.assert_close(r.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))


def test_invalid_samples_take_no_part():
    """Neither in the sum nor in the count, and NaN does not come back through the mask."""
    r = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    loss = loss_hinge(r, 2.0, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx((1 + 3) / 2)
    loss.backward()
    torch.testing.assert_close(r.grad, torch.tensor([-0.5, 0.0, -0.5]))
    assert loss_hinge(r, 2.0, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_eq_15_sums_over_models():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
    # (2-1 + 0)/2 + 0.5 * (1 + 1)/2
    assert loss_aes([a, b], [2.0, 1.0], weights=[1.0, 0.5]).item() == pytest.approx(0.5 + 0.5)
    with pytest.raises(ValueError, match="2 scores, 1 alphas"):
        loss_aes([a, b], [2.0])


def test_hinge_far_below_alpha_is_eq_12():
    """Up to the constant alpha."""
    r = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss_hinge(r, 100.0), 100 - r.mean())


def test_eq_16_and_17():
    instance = torch.tensor([0.0, 2.0, 4.0])
    assert loss_percep(instance).item() == 2
    assert loss_percep(instance, torch.tensor([True, True, False])).item() == 1
    assert loss_feedback(1.0, 2.0, 3.0, 1.0, 1.0, 0.0) == 3.0
    assert loss_feedback(1.0, 2.0, 3.0, 0.5, 2.0, 10.0) == pytest.approx(34.5)


def test_drift_has_no_gradient_into_the_reference():
    x, y = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    loss = loss_drift(x, y)
    loss.backward()
    assert loss.item() == 1 and y.grad is None
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2 / 6))
