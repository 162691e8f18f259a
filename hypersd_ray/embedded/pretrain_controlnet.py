"""Train a small ControlNet on the embedded world's edges, above its frozen teacher (Zhang et al. 2023)."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor

from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.embedded.training import flip_some, train
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.edges import Hint, edge_map
from hypersd_ray.models.encoders import load_encoders

EMPTY = 0.3
"""Share of captions left out: the edges alone must say what there is, as in the paper's training."""


def make_controlnet(teacher: str | Path) -> ControlNetModel:
    """The UNet's encoder with its weights; the hint goes down to the latents' size, its way in starts at zero."""
    info = read_base(teacher)
    unet, halvings = load_unet(info, torch.float32, "cpu"), int(math.log2(info.latent_factor))
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256)[: halvings + 1])


def train_controlnet(
    teacher: str | Path, images: Tensor, captions: list[str], kind: Hint, out: Path, steps: int, batch: int = 32,
    lr: float = 1e-3, seed: int = 0,
) -> ControlNetModel:  # fmt: skip
    """Train on uint8 pictures (N, 3, H, W), resuming from `out/{kind}_state.pt`; writes the folder `out/{kind}`."""
    torch.manual_seed(seed)
    info, encoders = read_base(teacher), load_encoders(teacher)
    unet = load_unet(info, torch.float32, "cpu").eval().requires_grad_(False)
    net = make_controlnet(teacher).train()
    hints = edge_map(images, kind)
    with torch.no_grad():
        texts = sorted(set(captions))
        told = torch.cat([encoders.encode_prompts(texts[i : i + 256]).prompt_embeds for i in range(0, len(texts), 256)])
        null = encoders.encode_prompts([""]).prompt_embeds
    place = {text: i for i, text in enumerate(texts)}
    row = torch.tensor([place[caption] for caption in captions])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=generator)
        pictures, flipped = flip_some(images[index], generator)
        hint = torch.where(flipped.view(-1, 1, 1, 1), hints[index].flip(-1), hints[index]).float() / 255
        x0 = encoders.encode_images(pictures)
        t = torch.randint(1, info.schedule.T + 1, (batch,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(batch, 1, 1, generator=generator) < EMPTY
        embeds = torch.where(dropped, null, told[row[index]])
        x_t = add_noise(info.schedule, x0, eps, t)
        time = t - 1  # the UNet counts its times from 0
        down, mid = net(x_t, time, embeds, controlnet_cond=hint, return_dict=False)
        predicted = unet(
            x_t, time, embeds, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return F.mse_loss(predicted, eps)

    train(kind, net, loss, steps, lr, out, seed, of=_belongs(info.path, images, captions, seed))
    net.eval().save_pretrained(out / kind, safe_serialization=True)
    return net


def _belongs(teacher: Path, images: Tensor, captions: list[str], seed: int) -> str:
    """A hash of what the training is a function of, beside its kind and length."""
    digest = hashlib.sha256("\n".join([str(seed), *captions]).encode())
    digest.update(images.numpy().tobytes())
    for file in sorted(teacher.glob("*/*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
