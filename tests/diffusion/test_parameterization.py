"""Round trips between what a network outputs and (x0, eps), guidance and offset noise."""

import pytest
import torch

from hypersd_ray.diffusion.guidance import guide
from hypersd_ray.diffusion.noise import perturb
from hypersd_ray.diffusion.parameterization import Prediction, to_prediction
from hypersd_ray.diffusion.schedule import add_noise, flow, scaled_linear

ALL = ["epsilon", "v_prediction", "sample", "flow"]


def from_prediction(p: Prediction, alpha: torch.Tensor, sigma: torch.Tensor, parameterization: str) -> torch.Tensor:
    """What the network would have to output for this prediction: the definitions, which `to_prediction` inverts."""
    return {
        "epsilon": p.eps,
        "sample": p.x0,
        "v_prediction": alpha * p.eps - sigma * p.x0,
        "flow": p.eps - p.x0,
    }[parameterization]


def _data(dtype=torch.float64, n=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, 3, 3, generator=g, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("parameterization", ALL)
@pytest.mark.parametrize("schedule", [scaled_linear(), flow()])
def test_round_trip(parameterization, schedule):
    x0, eps = _data()
    t = torch.tensor([1, 20, 500, 800, 999])
    alpha, sigma = schedule.at(t, dtype=torch.float64)
    x_t = add_noise(schedule, x0, eps, t)
    output = from_prediction(Prediction(x0, eps), alpha, sigma, parameterization)
    back = to_prediction(output, x_t, alpha, sigma, parameterization)
    torch.testing.assert_close(back.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.eps, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parameterization", ALL)
def test_any_output_explains_x_t(parameterization):
    """Whatever a network says, alpha x0 + sigma eps = x_t: a prediction lies on the point it was made at."""
    x_t, output = _data()
    alpha, sigma = scaled_linear().at(torch.tensor([1, 20, 500, 800, 1000]), dtype=torch.float64)
    p = to_prediction(output, x_t, alpha, sigma, parameterization)
    torch.testing.assert_close(alpha * p.x0 + sigma * p.eps, x_t, rtol=1e-10, atol=1e-10)


def test_definitions_in_numbers():
    # alpha = 0.6, sigma = 0.8, x0 = 2, eps = 1: x_t = 1.2 + 0.8 = 2; v = 0.6 * 1 - 0.8 * 2 = -1; flow = 1 - 2 = -1
    alpha, sigma = torch.tensor([[0.6]]), torch.tensor([[0.8]])
    p = Prediction(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    outputs = [from_prediction(p, alpha, sigma, name).item() for name in ALL]
    assert outputs == pytest.approx([1.0, -1.0, 2.0, -1.0])


@pytest.mark.parametrize("parameterization", ["v_prediction", "flow"])
def test_no_division_by_a_vanished_alpha(parameterization):
    x_t, output = _data(n=1)
    alpha, sigma = flow().at(torch.tensor([1000]), dtype=torch.float64)
    p = to_prediction(output, x_t, alpha, sigma, parameterization)
    assert torch.isfinite(p.x0).all() and torch.equal(p.eps, x_t)


def test_half_precision_output_is_converted_in_float32():
    """At T an error of epsilon reaches x0 14.6 times larger, so bfloat16 arithmetic would show."""
    x_t, output = _data(torch.float32, n=1)
    output = output.bfloat16()
    alpha, sigma = scaled_linear().at(torch.tensor([1000]))
    p = to_prediction(output, x_t.bfloat16(), alpha.bfloat16(), sigma.bfloat16(), "epsilon")
    assert p.x0.dtype == p.eps.dtype == torch.float32
    p = to_prediction(output, x_t, alpha, sigma, "epsilon")
    exact = (x_t.double() - sigma.double() * output.double()) / alpha.double()
    torch.testing.assert_close(p.x0.double(), exact, rtol=0, atol=1e-4)


def test_unknown_name_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="'eps'"):
        to_prediction(one, one, one, one, "eps")


def test_guidance_is_a_scale_per_sample():
    cond, uncond = torch.full((3, 1, 1, 1), 3.0), torch.full((3, 1, 1, 1), 1.0)
    # 1 + omega * (3 - 1): 0 -> 1 (no prompt), 1 -> 3 (no guidance), 7.5 -> 16
    assert guide(cond, uncond, torch.tensor([0.0, 1.0, 7.5])).flatten().tolist() == [1.0, 3.0, 16.0]
    with pytest.raises(ValueError, match="omega"):
        guide(cond, uncond, torch.tensor([1.0]))


@pytest.mark.parametrize("parameterization", ALL)
def test_guiding_outputs_is_guiding_predictions(parameterization):
    cond, uncond = _data()
    x_t, omega = cond.roll(1, 0), torch.linspace(0, 8, 5, dtype=torch.float64)
    alpha, sigma = scaled_linear().at(torch.tensor([1, 20, 500, 800, 1000]), dtype=torch.float64)
    p, q = (to_prediction(o, x_t, alpha, sigma, parameterization) for o in (cond, uncond))
    guided = to_prediction(guide(cond, uncond, omega), x_t, alpha, sigma, parameterization)
    torch.testing.assert_close(guided.x0, guide(p.x0, q.x0, omega), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(guided.eps, guide(p.eps, q.eps, omega), rtol=1e-8, atol=1e-8)


def test_offset_noise_shifts_each_channel_as_a_whole():
    eps = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shift = perturb(eps, 0.1, torch.Generator().manual_seed(1)) - eps
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    # 256 draws of N(0, 0.1^2): the measured deviation is within 0.1 * (1 +- 4 / sqrt(2 * 256)) = 0.1 +- 0.018
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.1, abs=0.018)
    assert shift[:, :, 0, 0].unique().numel() == 256
    assert perturb(eps, 0.0, torch.Generator()) is eps
    with pytest.raises(ValueError, match="strength"):
        perturb(eps, -0.1, torch.Generator())
