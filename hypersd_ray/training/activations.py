"""What a UNet's passes take beside its weights: measured on a network that has shapes and no numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.diffusion.segments import Times
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.roles import Plain
from hypersd_ray.training.adversarial import adversarial_losses
from hypersd_ray.training.allocations import Allocations
from hypersd_ray.training.tscd import Pair


@dataclass(frozen=True)
class Shape:
    """A UNet's config as (name, value) pairs, and what it is called with.

    `autocast`: float32 weights, computing in bfloat16 (plain training of a full UNet); else all is of `dtype`.
    """

    config: tuple[tuple[str, Any], ...]
    size: int
    dtype: torch.dtype
    autocast: bool = False
    checkpointing: bool = False
    tokens: int = 77


@dataclass(frozen=True)
class Pass:
    """Bytes that wait for the backward pass, and the most that are held at a time; gradients of weights not counted."""

    kept: int
    peak: int


def shape_of(config: dict[str, Any], **told: Any) -> Shape:
    """From a UNet's config.json."""
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    return Shape(tuple(sorted(hashable.items())), **told)


class _NormsInFloat32(TorchFunctionMode):
    """CUDA's autocast computes norms in float32; the CPU's, which the fake tensors follow, does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            with torch.autocast("cpu", enabled=False):
                return func(*(a.float() if isinstance(a, Tensor) else a for a in args), **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _network(shape: Shape) -> Iterator[Callable[[int], tuple[Any, Tensor, Tensor, Conditioning]]]:
    """-> make(rows): the UNet and what it is told, fake."""
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.float32 if shape.autocast else shape.dtype)
        try:
            unet = UNet2DConditionModel.from_config(dict(shape.config)).eval()
        finally:
            torch.set_default_dtype(before)
        if shape.checkpointing:
            unet.enable_gradient_checkpointing()
        for p in unet.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def make(rows: int) -> tuple[Any, Tensor, Tensor, Conditioning]:
            x = torch.empty(rows, unet.config.in_channels, shape.size, shape.size, dtype=shape.dtype)
            text = torch.empty(rows, shape.tokens, unet.config.cross_attention_dim, dtype=shape.dtype)
            pooled = time_ids = None
            if unet.config.addition_embed_type == "text_time":
                sizes = 6 * unet.config.addition_time_embed_dim
                width = unet.config.projection_class_embeddings_input_dim - sizes
                pooled, time_ids = torch.empty(rows, width, dtype=shape.dtype), torch.empty(rows, 6)
            return unet, x, torch.zeros(rows, dtype=torch.long), Conditioning(text, pooled, time_ids)

        yield make


@contextmanager
def _computing(shape: Shape) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.autocast):
        if shape.autocast:
            with _NormsInFloat32():
                yield
        else:
            yield


@functools.lru_cache(maxsize=64)
def learning(shape: Shape, rows: int) -> Pass:
    """The network's forward and backward pass."""
    with _network(shape) as make, Allocations() as held:
        unet, x, index, cond = make(rows)
        with _computing(shape):
            out = unet(x, index, cond.prompt_embeds, added_cond_kwargs=cond.added_kwargs()).sample
        kept = held.now
        out.float().square().mean().backward()
        return Pass(kept, held.peak)


@functools.lru_cache(maxsize=64)
def looking(shape: Shape, rows: int) -> int:
    """The most that a pass without gradient holds."""
    with _network(shape) as make, torch.no_grad(), Allocations() as held:
        unet, x, index, cond = make(rows)
        with _computing(shape):
            unet(x, index, cond.prompt_embeds, added_cond_kwargs=cond.added_kwargs())
        return held.peak


@functools.lru_cache(maxsize=64)
def judging(shape: Shape, rows: int) -> int:
    """The most that both adversarial losses of a student's picture hold, with their backward passes."""
    schedule = scaled_linear()  # which looks at its numbers
    with _network(shape) as make:
        unet, x, index, cond = make(rows)
        roles = Plain(unet.requires_grad_(False), schedule, "epsilon")
        heads = LatentDiscriminator(dict(unet.config), seed=0)
        pair = Pair(x.float().requires_grad_(), x.float(), Times(index + 2, index, index, index), x.float())
        with Allocations() as held:
            student, discriminator = adversarial_losses(roles, heads, pair, cond, "hinge", torch.Generator())
            discriminator.backward()
            student.backward()
        return held.peak
