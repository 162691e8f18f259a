"""Distances in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypersd_ray.losses.distances import mse, pseudo_huber


def test_mse_is_the_mean_per_sample():
    pred = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    # (1 + 4) / 2 = 2.5 and (9 + 16) / 2 = 12.5
    assert mse(pred, torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])).tolist() == [2.5, 12.5]


@given(st.floats(-10, 10), st.floats(1e-3, 10))
def test_pseudo_huber_is_its_formula(d, c):
    got = pseudo_huber(torch.tensor([[d]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), c)
    assert got.item() == pytest.approx((d * d + c * c) ** 0.5 - c, abs=1e-12)


def test_pseudo_huber_limits():
    zero = torch.zeros(2, 1)
    # far below c: d^2 / (2 c) = 1e-10 / 2e-3 = 5e-8, which sqrt(d^2 + c^2) - c would lose in float32; above: |d| - c
    assert pseudo_huber(torch.tensor([[1e-5], [5.0]]), zero).tolist() == pytest.approx([5e-8, 4.999], rel=1e-4)
    x = torch.zeros(1, 1, requires_grad=True)
    pseudo_huber(x, torch.zeros(1, 1)).sum().backward()
    assert x.grad.item() == 0.0


@pytest.mark.parametrize("distance", [mse, pseudo_huber])
def test_computed_in_float32(distance):
    pred, target = torch.full((1, 4096), 1.0, dtype=torch.bfloat16), torch.full((1, 4096), 0.99, dtype=torch.float32)
    assert distance(pred, target).dtype == torch.float32
    # 1 - 0.99 = 0.01 survives; in bfloat16 0.99 is 0.98828 and the difference 0.0117
    expected = {mse: 1e-4, pseudo_huber: (1e-4 + 1e-6) ** 0.5 - 1e-3}[distance]
    assert distance(pred, target).item() == pytest.approx(expected, rel=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="one shape"):
        mse(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="c=0"):
        pseudo_huber(torch.zeros(1, 1), torch.zeros(1, 1), c=0)
