"""The layer with a low-rank update: its gradients, what it keeps, and when it takes which path."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.models import low_rank as module
from hypersd_ray.models.lean import LeanFeedForward, LeanResnetBlock2D
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.low_rank import low_rank, takes_side_path
from hypersd_ray.models.roles import LoRARoles
from tests.helpers.pipelines import call, random_inputs, randomize, tiny_unet

SCALE = 1.5
# layer, rank, x's shape; does it take the side path?  Of the merged: are dA and dB made in low-rank form?
CASES = {
    "linear, few": (lambda: nn.Linear(6, 5), 2, (2, 6), True, True),
    "linear, many": (lambda: nn.Linear(6, 5), 1, (2, 7, 6), False, True),
    "linear, many, high rank": (lambda: nn.Linear(6, 5, bias=False), 4, (2, 7, 6), False, False),
    "conv, few": (lambda: nn.Conv2d(4, 6, 3, padding=1), 2, (1, 4, 2, 2), True, True),
    "conv, many": (lambda: nn.Conv2d(3, 4, 3, padding=1), 1, (2, 3, 4, 3), False, True),
    "conv, many, high rank": (lambda: nn.Conv2d(3, 4, 3, padding=1), 3, (2, 3, 4, 3), False, False),
    "conv, stride 2, few": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 2, (1, 4, 3, 3), True, True),
    "conv, stride 2, many": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), 1, (2, 2, 5, 5), False, True),
    "conv 1x1": (lambda: nn.Conv2d(4, 5, 1), 1, (2, 4, 3, 3), False, True),
}


def build(make, rank, shape, dtype=torch.float64):
    """A frozen layer, x, A and B, random; the leaves with gradient."""
    torch.manual_seed(0)
    layer = make().to(dtype).requires_grad_(False)
    out, *fan = layer.weight.shape
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    a = torch.randn(rank, *fan, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    b = torch.randn(out, rank, *[1] * (len(fan) - 1), dtype=a.dtype, requires_grad=True)
    return layer, x, a, b


def plain(layer, x, a, b):
    """The definition, by autograd."""
    weight = layer.weight + SCALE * (b.flatten(1) @ a.flatten(1)).view(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    make, rank, shape, side, cheap = CASES[case]
    layer, x, a, b = build(make, rank, shape)
    assert takes_side_path(layer, x) is side
    if not side:
        assert module._low_rank_gradients_are_cheaper(layer, x, rank) is cheap
    torch.testing.assert_close(low_rank(x, layer, a, b, SCALE), plain(layer, x, a, b), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank(x, layer, a, b, SCALE), (x, a, b))


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_what_is_made_again(case):
    make, rank, shape, *_ = CASES[case]
    layer, x, a, b = build(make, rank, shape)
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def before(x):
        return torch.sin(slope * x) * x

    for frozen in (None, x, slope):
        for t in (x, slope):
            t.requires_grad_(t is not frozen)
        wanted = [t for t in (x, a, b, slope) if t.requires_grad]
        lean = low_rank(x, layer, a, b, SCALE, before, (slope,))
        made = plain(layer, before(x), a, b)
        torch.testing.assert_close(lean, made, rtol=1e-12, atol=1e-12)
        ours, expected = (torch.autograd.grad(y.cos().sum(), wanted) for y in (lean, made))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "factors"])
@pytest.mark.parametrize("case", ["linear, few", "linear, many", "conv, few", "conv, many"])
def test_only_what_is_asked_for_gets_a_gradient(case, frozen):
    make, rank, shape, *_ = CASES[case]
    layer, x, a, b = build(make, rank, shape)
    for t in (x,) if frozen == "x" else (a, b):
        t.requires_grad_(False)
    leaves = [t for t in (x, a, b) if t.requires_grad]
    ours = torch.autograd.grad(low_rank(x, layer, a, b, SCALE).cos().sum(), leaves)
    expected = torch.autograd.grad(plain(layer, x, a, b).cos().sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def kept(make_output):
    """Output, and the bytes of the storages kept for its backward pass, by address."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = make_output()
    return output, storages


def test_it_keeps_x_and_the_factors_and_no_more():
    for case in ("linear, many", "conv, many"):
        make, rank, shape, *_ = CASES[case]
        layer, x, a, b = build(make, rank, shape)
        _, storages = kept(lambda: low_rank(x, layer, a, b, SCALE, torch.sigmoid))  # noqa: B023
        assert set(storages) == {t.data_ptr() for t in (x, a, b)}
        with torch.no_grad():
            _, storages = kept(lambda: low_rank(x, layer, a, b, SCALE, torch.sigmoid))  # noqa: B023
        assert not storages


def test_factors_that_change_before_the_backward_pass_are_noticed():
    layer, x, a, b = build(*CASES["linear, many"][:3])
    for changed in (a, b):
        y = low_rank(x, layer, a, b, SCALE)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("case", ["linear, many", "conv, many", "conv, stride 2, few"])
def test_a_bfloat16_layer_keeps_float32_factors(case):
    make, rank, shape, *_ = CASES[case]
    layer, x, a, b = build(make, rank, shape, torch.bfloat16)
    assert a.dtype == torch.float32
    assert takes_side_path(layer, x)  # always: see below
    y = low_rank(x, layer, a, b, SCALE)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = plain(exact, *leaves)
    expected.square().sum().backward()
    for ours, theirs in ((y, expected), (x.grad, leaves[0].grad), (a.grad, leaves[1].grad), (b.grad, leaves[2].grad)):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()  # a few roundings to 8 bits, 2^-9 each


def test_a_small_update_of_a_bfloat16_layer_does_not_round_away():
    layer, x, a, b = build(lambda: nn.Linear(64, 64, bias=False), 1, (8, 64), torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        x.copy_(torch.randn(4, 64).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(4)[:, None])
        x.sub_(x.mean(1, keepdim=True))  # W x is about 0, so that the sum of both paths has room for the update
        a.fill_(1e-3)
        a[:, ::2] *= -1
        b.fill_(1.0)
        assert torch.equal(layer.weight + (b @ a).bfloat16(), layer.weight)  # merged, it is lost
        change = low_rank(x, layer, a, b, 1.0) - layer(x)
    expected = x.double() @ (b @ a).double().t()
    assert (change.double() - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_unet_keeps_less_and_computes_the_same(family):
    unet = tiny_unet(family)
    x_t, t, cond = random_inputs(family)
    adapters = Adapters(unet, 4, 6.0)
    adapters.add("student", trainable=True)
    randomize(adapters, "student")
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D | FeedForward)]
    assert {type(m) for m in blocks} == {LeanResnetBlock2D, LeanFeedForward}

    def run():
        with adapters.playing("student"):
            output, storages = kept(lambda: call(unet, x_t, t, cond))
        gradients = torch.autograd.grad(output.square().sum(), list(adapters.named_tensors("student").values()))
        return output, gradients, sum(storages.values())

    output, gradients, less = run()
    for block in blocks:
        block.__class__ = next(c for c in (ResnetBlock2D, FeedForward) if isinstance(block, c))
    expected, expected_gradients, more = run()
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    fixed = sum(p.untyped_storage().nbytes() for p in unet.parameters())
    assert less - fixed < 0.7 * (more - fixed)


def test_a_block_that_computes_something_else_stays():
    unet = tiny_unet("sd")
    first, second, *others = (m for m in unet.modules() if isinstance(m, ResnetBlock2D))
    first.dropout.p, second.time_embedding_norm = 0.1, "scale_shift"
    Adapters(unet, 4, 6.0)
    assert type(first) is type(second) is ResnetBlock2D
    assert {type(m) for m in others} == {LeanResnetBlock2D}
    partial = tiny_unet("sd")
    Adapters(partial, 4, 6.0, targets=("to_q", "ff.net.2", "conv1"))
    blocks = {type(m) for m in partial.modules() if isinstance(m, ResnetBlock2D | FeedForward)}
    assert blocks == {ResnetBlock2D, FeedForward}


def test_the_copies_of_a_16_bit_base_follow_its_factors():
    """After an optimiser's step, which no version counter of a fused AdamW tells of."""
    unet = tiny_unet("sd").bfloat16()
    x_t, t, cond = random_inputs("sd")
    x_t, cond = x_t.bfloat16(), cond.cast(torch.bfloat16)
    adapters = Adapters(unet, 4, 6.0)
    adapters.add("student", trainable=True)
    randomize(adapters, "student")
    factors = list(adapters.named_tensors("student").values())
    optimizer = torch.optim.AdamW(factors, lr=0.1, fused=True)

    def run():
        with adapters.playing("student"):
            output = call(unet, x_t, t, cond)
        return output.detach(), torch.autograd.grad(output.square().sum(), factors)

    before, gradients = run()
    for factor, gradient in zip(factors, gradients, strict=True):
        factor.grad = gradient
    optimizer.step()
    after, gradients = run()
    for layer in adapters.layers.values():
        layer.low.clear()  # from now on each layer makes its own, at each call
    expected, expected_gradients = run()
    assert torch.equal(after, expected) and not torch.equal(after, before)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda roles: roles.ema_update(0.5),
        lambda roles: roles.copy("student", "ema"),
        lambda roles: roles.load("ema", {n: t / 2 for n, t in roles.named_tensors("student").items()}),
    ],
    ids=["ema_update", "copy", "load"],
)
def test_the_copies_follow_what_changes_a_role_without_an_optimiser(change):
    roles = LoRARoles(tiny_unet("sd").bfloat16(), scaled_linear(), "epsilon", rank=4, alpha=6.0)
    roles.add("student", trainable=True)
    roles.add("ema")
    randomize(roles.adapters, "student")
    x_t, t, cond = random_inputs("sd")

    def run():
        with torch.no_grad():
            return roles.predict("ema", x_t.bfloat16(), t, cond.cast(torch.bfloat16)).x0

    before = run()
    change(roles)
    after = run()
    for layer in roles.adapters.layers.values():
        layer.low.clear()
    assert torch.equal(after, run()) and not torch.equal(after, before)
