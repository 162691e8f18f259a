"""From latents to pictures with a gradient, and what pictures look like in numbers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def decode(vae: AutoencoderKL, latents: Tensor, batch: int) -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1], differentiable, float32.

    `batch` latents at a time, and their activations are made again in the backward pass: the decoder of a 1024 px
    picture would else hold gigabytes. float32 because SDXL's overflows in half precision.
    """
    scale = vae.config.scaling_factor

    def one(z: Tensor) -> Tensor:
        return vae.decode(z / scale).sample

    parts = [
        checkpoint(one, z, use_reentrant=False) if torch.is_grad_enabled() and z.requires_grad else one(z)
        for z in latents.float().split(batch)
    ]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


@torch.no_grad()
def saturation(images: Tensor) -> Tensor:
    """Mean colourfulness max(rgb) - min(rgb) of pictures (B, 3, H, W) in [0, 1]: a scalar. Rewards like to raise it."""
    return (images.amax(1) - images.amin(1)).mean()


@torch.no_grad()
def diversity(images: Tensor) -> Tensor:
    """Root mean squared distance of the pictures to their mean picture: a scalar, 0 when all are alike."""
    return (images - images.mean(0, keepdim=True)).square().mean().sqrt()
