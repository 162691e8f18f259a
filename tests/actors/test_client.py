"""The call across the boundary, without Ray: gradients, NaN, half precision."""

import time

import pytest
import torch

from hypersd_ray.actors.messages import gradient_of, pack, to_answer, unpack
from hypersd_ray.models.evaluators import evaluate
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.rewards.protocol import Scored
from hypersd_ray.models.scoring import LocalBackend, RewardClient


def bright(images, told):
    """Mean square plus the prompt's length."""
    return images.square().mean((1, 2, 3)) + torch.tensor([float(len(t)) for t in told])


def red(images, told):
    return images[:, 0].mean((1, 2)) ** 3


@pytest.fixture
def images():
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "bb", "", "dddd"]


def test_scores_and_gradients_are_autograds(images):
    """Several models, each with its own weight, through one call."""
    client = RewardClient(LocalBackend({"bright": bright, "red": red}))
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0])
    x = images.clone().requires_grad_(True)
    scores = client(2 * x, {"bright": PROMPTS, "red": PROMPTS})
    (scores["bright"].values * weight + 5 * scores["red"].values).sum().backward()
    y = images.clone().requires_grad_(True)
    (bright(2 * y, PROMPTS) * weight + 5 * red(2 * y, PROMPTS)).sum().backward()
    torch.testing.assert_close(scores["bright"].values.detach(), bright(2 * images, PROMPTS))
    torch.testing.assert_close(x.grad, y.grad)
    assert scores["red"].valid.all() and client.dropped == {"bright": 0, "red": 0}


def test_nan_drops_the_sample_and_is_counted(images):
    def broken(pixels, told):
        return torch.where(torch.tensor([t == "bb" for t in told]), torch.nan, bright(pixels, told))

    client = RewardClient(LocalBackend({"broken": broken}))
    x = images.clone().requires_grad_(True)
    for _ in range(2):
        scores = client(x, {"broken": PROMPTS})["broken"]
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.values[1] == 0 and client.dropped == {"broken": 2}
    scores.values.sum().backward()
    assert (x.grad[1] == 0).all() and torch.isfinite(x.grad).all() and (x.grad[0] != 0).all()


def test_a_gradient_of_nan_drops_the_sample_too(images):
    """sqrt at 0: a finite value with an infinite slope."""
    images[2] = 0
    client = RewardClient(LocalBackend({"root": lambda p, told: p.sqrt().mean((1, 2, 3))}))
    scores = client(images.requires_grad_(True), {"root": PROMPTS})["root"]
    assert scores.valid.tolist() == [True, True, False, True]


def test_watching_makes_no_graph(images):
    client = RewardClient(LocalBackend({"bright": bright}))
    scores = client(images.requires_grad_(True), {"bright": PROMPTS}, gradient=False)
    assert not scores["bright"].values.requires_grad


def test_half_precision_keeps_small_gradients(images):
    """1e-9 a pixel is below float16's least number; scaled by sample it keeps 11 bits."""
    gradient = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-9, 1.0, 1e5, 0.0]
    ).view(-1, 1, 1, 1)
    answer = to_answer(Scored(torch.zeros(4), gradient))
    assert str(answer.direction.dtype) == "float16"
    back = gradient_of(answer, gradient)
    scale = gradient.abs().amax((1, 2, 3), keepdim=True)
    assert ((back - gradient).abs() <= scale * 2**-11 + 1e-30).all()
    assert (back[3] == 0).all()


def test_annotations_travel_packed():
    g = torch.Generator().manual_seed(0)
    instances = Instances(torch.rand(3, 5, 7, generator=g) > 0.5, torch.tensor([4, 0, 79]))
    real = torch.rand(3, 4, 4, generator=g)
    packed = pack([instances, "a prompt", real])
    assert packed[0].bits.nbytes == -(-3 * 5 * 7 // 8)
    back, prompt, picture = unpack(packed)
    assert torch.equal(back.masks, instances.masks) and back.labels.tolist() == [4, 0, 79]
    assert prompt == "a prompt"
    torch.testing.assert_close(picture, real, atol=5e-4, rtol=0)


def test_a_value_without_a_graph_has_a_zero_gradient(images):
    scored = evaluate(lambda p, told: torch.zeros(len(p)), images, PROMPTS, gradient=True)
    assert (scored.gradient == 0).all()


def test_the_time_that_was_waited_is_counted_until_it_is_taken(images):
    def slow(pixels, told, gradient):
        time.sleep(0.05)
        return LocalBackend({"bright": bright})(pixels, told, gradient)

    client = RewardClient(slow)
    for _ in range(2):
        client(images, {"bright": PROMPTS}, gradient=False)
    assert 0.1 <= client.take_seconds() < 10
    assert client.take_seconds() == 0
