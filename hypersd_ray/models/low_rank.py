"""A frozen layer with a low-rank update, as one operation that keeps little for its backward pass.

`y = (W + s B A) z + bias`, z = x or a cheap function of x. Autograd would keep the merged weight, or the side path's
activations, and z beside x. This keeps x: the merged weight and z are made again in the backward pass.

Shapes: W (out, in[, kh, kw]); A (r, in[, kh, kw]); B (out, r[, 1, 1]); x of `nn.Linear` (..., in), of `nn.Conv2d`
(batch, in, h, w). "Positions" are the output's rows or pixels, over the batch.

Beside a 16-bit layer the factors are multiplied in its number type. Who keeps such copies of all of a network's factors
(`Low`) can make them with one operation for many layers; made here, layer by layer and pass by pass, they were a third of
all operations of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Layer = nn.Linear | nn.Conv2d
Before = Callable[[Tensor], Tensor]
"""What is applied to x first. It must be a pure function: it is called again in the backward pass."""
Low = tuple[Tensor, Tensor]
"""A and B in the layer's number type."""


def low_rank(
    x: Tensor, layer: Layer, a: Tensor, b: Tensor, scale: float,
    before: Before | None = None, through: tuple[Tensor, ...] = (), low: Low | None = None,
) -> Tensor:  # fmt: skip
    """`layer` with the weight W + scale * B A, of `before(x)`; gradients never reach the layer's own tensors.

    Args:
        x: in the layer's number type.
        layer: frozen; a convolution of one group, padded with zeros.
        a, b: the factors; their gradients have their number type, whatever the layer's is.
        before: None is the identity.
        through: those leaves that `before` uses and that get a gradient; any other it uses gets none.
        low: copies of the factors, as they are now; None makes them where they are needed.
    """
    return _LowRank.apply(x, a, b, layer, scale, before, low, *through)


def merged(layer: Layer, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in W's shape."""
    weight = layer.weight
    return torch.addmm(weight.flatten(1), b.flatten(1) * scale, a.flatten(1)).view(weight.shape)


def positions(layer: Layer, z: Tensor) -> int:
    """How many output rows (linear) or pixels (convolution) `z` gives."""
    if isinstance(layer, nn.Linear):
        return z.numel() // z.shape[-1]
    return z.shape[0] * z.shape[2] * z.shape[3] // math.prod(layer.stride)


def takes_side_path(layer: Layer, z: Tensor) -> bool:
    """Whether B (A z) is computed beside W z, rather than merged into W.

    Merged into a 16-bit weight, a small update would round away. Else the cheaper: r * (in + out) multiplications a
    position, against r * in * out once and a weight written.
    """
    if layer.weight.dtype not in (torch.float32, torch.float64):
        return True
    n_out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    return positions(layer, z) * (fan_in + n_out) < fan_in * n_out


def _low_rank_gradients_are_cheaper(layer: Layer, z: Tensor, rank: int) -> bool:
    """dA and dB from z, A z and B^T g, rather than from dW."""
    n_out, fan_in, count = layer.weight.shape[0], layer.weight[0].numel(), positions(layer, z)
    return 2 * count * rank * (fan_in + n_out) < count * fan_in * n_out + 2 * rank * fan_in * n_out


def _product(layer: Layer, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer with another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(z, weight, bias)
    return F.conv2d(z, weight, bias, layer.stride, layer.padding, layer.dilation)


def _add_expanded(y: Tensor, h: Tensor, b: Tensor, scale: float) -> None:
    """y += scale * B h, in place: the sum takes no memory of its own."""
    if b.ndim == 2:
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b.t(), alpha=scale)
    else:
        y.add_(F.conv2d(h, b), alpha=scale)


def _add_input_gradient(grad: Tensor, v: Tensor, z: Tensor, a: Tensor, layer: Layer) -> None:
    """grad += the gradient in z of A z, in place."""
    if a.ndim == 2:
        grad.view(-1, grad.shape[-1]).addmm_(v.reshape(-1, v.shape[-1]), a)
    else:
        grad.add_(_input_gradient(v, z, a, layer))


def _input_gradient(g: Tensor, z: Tensor, weight: Tensor, layer: Layer | None) -> Tensor:
    """Gradient in z of `_product(layer, z, weight)`, or of the 1x1 product that `layer=None` stands for."""
    if weight.ndim == 2:
        return (g.reshape(-1, g.shape[-1]) @ weight).view(*g.shape[:-1], weight.shape[1])
    return _convolution_backward(g, z, weight, layer, (True, False, False))[0]


def _weight_gradient(g: Tensor, z: Tensor, weight: Tensor, layer: Layer | None) -> Tensor:
    """The same's gradient in the weight; of the weight itself only the shape matters."""
    if weight.ndim == 2:
        return g.reshape(-1, g.shape[-1]).t() @ z.reshape(-1, z.shape[-1])
    return _convolution_backward(g, z, weight, layer, (False, True, False))[1]


def _convolution_backward(
    g: Tensor, z: Tensor, weight: Tensor, layer: Layer | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = ((1, 1), (0, 0), (1, 1))
    if layer is not None:
        stride, padding, dilation = layer.stride, layer.padding, layer.dilation  # type: ignore[assignment]
    return torch.ops.aten.convolution_backward(g, z, weight, None, stride, padding, dilation, False, (0, 0), 1, wanted)


class _LowRank(torch.autograd.Function):
    """See `low_rank`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Layer, scale: float, before: Before | None, low: Low | None,
        *through: Tensor,
    ) -> Tensor:  # fmt: skip
        z, h = x if before is None else before(x), None
        # Not among the saved tensors: the copies may be made again before the backward pass, of factors that are the same.
        ctx.layer, ctx.scale, ctx.before, ctx.low = layer, scale, before, low
        if takes_side_path(layer, z):
            low_a, low_b = _low(a, b, low, layer.weight.dtype)
            y, h = _product(layer, z, layer.weight, layer.bias), _product(layer, z, low_a)
            _add_expanded(y, h, low_b, scale)
        else:
            y = _product(layer, z, merged(layer, a, b, scale), layer.bias)
        # h has r channels and, in 32 bit, few positions: little to keep. `through` is kept so that autograd notices
        # if an optimiser changes it before `before` is called again.
        ctx.save_for_backward(x, a, b, h, *through)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, *through = ctx.saved_tensors
        need_x, need_a, need_b, _, _, _, _, *need_through = ctx.needs_input_grad
        need_factors = need_a or need_b
        factors = a, b, ctx.low, ctx.scale
        if ctx.before is None:
            return *_backward(ctx.layer, g, x, h, *factors, need_x, need_factors), None, None, None, None
        need_z = need_x or any(need_through)
        with torch.set_grad_enabled(need_z):
            leaf = x.detach().requires_grad_(need_x)
            z = ctx.before(leaf)
        grad_z, *grads = _backward(ctx.layer, g, z.detach(), h, *factors, need_z, need_factors)
        wanted = [t for t, need in zip([leaf, *through], [need_x, *need_through], strict=True) if need]
        found = iter(torch.autograd.grad(z, wanted, grad_z) if wanted else ())
        grad_x, *grad_through = [next(found) if need else None for need in [need_x, *need_through]]
        return grad_x, *grads, None, None, None, None, *grad_through


def _low(a: Tensor, b: Tensor, low: Low | None, dtype: torch.dtype) -> Low:
    return (a.to(dtype), b.to(dtype)) if low is None else low


def _backward(
    layer: Layer, g: Tensor, z: Tensor, h: Tensor | None, a: Tensor, b: Tensor, low: Low | None, scale: float,
    need_z: bool, need_factors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients in z, A and B; h is A z where the side path was taken."""
    side = h is not None
    grad_z = grad_a = grad_b = None
    if need_z:
        grad_z = _input_gradient(g, z, layer.weight if side else merged(layer, a, b, scale), layer)
    if side or (need_factors and _low_rank_gradients_are_cheaper(layer, z, a.shape[0])):
        low_a, low_b = _low(a, b, low, g.dtype)
        h = _product(layer, z, low_a) if h is None else h
        v = _input_gradient(g, h, low_b, None)
        if scale != 1:
            v.mul_(scale)
        if side and grad_z is not None:
            _add_input_gradient(grad_z, v, z, low_a, layer)
        if need_factors:
            grad_a = _weight_gradient(v, z, low_a, layer).to(a.dtype)
            grad_b = _weight_gradient(g, h, low_b, None).to(b.dtype)
            if scale != 1:
                grad_b = grad_b * scale
    elif need_factors:
        grad_weight = _weight_gradient(g, z, layer.weight, layer).flatten(1)
        grad_a = (b.flatten(1).t() * scale @ grad_weight).view(a.shape)
        grad_b = (grad_weight @ a.flatten(1).t() * scale).view(b.shape)
    return grad_z, grad_a, grad_b
