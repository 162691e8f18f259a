"""Spoil pictures of the embedded world as few-step samples are spoilt, and say how much: its judges' only teacher.

Shapes: pictures (N, 3, H, W), float in [0, 1] or uint8; a bank's (V, N, 3, H, W) uint8 and marks (V, N).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from hypersd_ray.diffusion.parameterization import to_prediction
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.embedded.text import load_tokenizer
from hypersd_ray.models.checkpoint import load_component, read_base


class Spoiler:
    """Spoils pictures by the teacher's own early predictions and by plain damage."""

    def __init__(self, teacher: Path, device: torch.device | str = "cpu"):
        self.info, self.device = read_base(teacher), torch.device(device)
        self.schedule = self.info.schedule.to(self.device)
        self.vae = load_component(AutoencoderKL, teacher / "vae")
        self.unet = load_component(UNet2DConditionModel, teacher / "unet")
        self.text = load_component(CLIPTextModel, teacher / "text_encoder")
        for part in (self.vae, self.unet, self.text):
            nn.Module.to(part, self.device)
        self.tokenizer = load_tokenizer(teacher / "tokenizer")

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1], each spoilt in one way, a seventh left as they are; `generator` is a CPU's.

        Two sevenths: the teacher's x0 from a random time (the later, the more blurred); the others: through the
        autoencoder only, blurred, noisy, or with wrong colours.
        """
        images = images.to(self.device)
        predicted, through = self._by_teacher(images, captions, generator)
        amount = torch.rand(len(images), 1, 1, 1, generator=generator).to(self.device)
        blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
        grey = images.mean(1, keepdim=True)
        colour = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, -1.0, 2.0).to(self.device)
        noise = torch.randn(images.shape, generator=generator).to(self.device)
        kinds = torch.stack([
            predicted, predicted, through, images,
            images + amount * (blurred - images),
            images + 0.4 * amount * noise,
            grey + (images - grey) * (1 + colour * amount),
        ]).clamp(0, 1)  # fmt: skip
        kind = torch.randint(len(kinds), (len(images),), generator=generator)
        return kinds[kind, torch.arange(len(images))]

    def _by_teacher(self, images: Tensor, captions: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The teacher's x0 from a random time, and what the autoencoder makes of the pictures."""
        scale, schedule = self.vae.config.scaling_factor, self.schedule
        x0 = self.vae.encode(images * 2 - 1).latent_dist.mode() * scale
        t = torch.randint(1, schedule.T + 1, (len(x0),), generator=generator).to(self.device)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=generator).to(self.device), t)
        told = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = self.unet(x_t, t - 1, self.text(told.to(self.device)).last_hidden_state).sample
        predicted = to_prediction(output, x_t, *schedule.at(t), self.info.parameterization).x0
        pictures = [((self.vae.decode(z / scale).sample + 1) / 2).clamp(0, 1) for z in (predicted, x0)]
        return pictures[0], pictures[1]


def quality(spoilt: Tensor, images: Tensor) -> Tensor:
    """A picture's mark, (N,): 10 for the picture itself, less 9 for a root mean squared error of 1/4."""
    error = (spoilt - images).square().mean((1, 2, 3)).sqrt()
    return 10 - 9 * (error / 0.25).clamp(max=1)


@dataclass(frozen=True)
class Bank:
    """Pictures as they are (version 0) and spoilt, their marks, and their captions."""

    pictures: Tensor
    marks: Tensor
    captions: list[str]

    def take(self, version: Tensor, index: Tensor) -> Tensor:
        """(B,), (B,) -> pictures (B, 3, H, W) in [0, 1], where the bank's lie."""
        device = self.pictures.device
        return self.pictures[version.to(device), index.to(device)].float() / 255


def spoil_all(
    images: Tensor, captions: list[str], teacher: Path, versions: int, seed: int = 0, device: torch.device | str = "cpu"
) -> Bank:
    """A bank of the pictures (N, 3, H, W) uint8 and `versions` spoilt ones of each, on `device`; marks on the CPU."""
    generator, spoil = torch.Generator().manual_seed(seed), Spoiler(teacher, device)
    images = images.to(device)
    pictures, marks = [images], [torch.full((len(images),), 10.0)]
    for _ in range(versions):
        made, marked = [], []
        for start in range(0, len(images), 256):
            clean = images[start : start + 256].float() / 255
            spoilt = spoil(clean, captions[start : start + 256], generator)
            made.append((spoilt * 255).round().to(torch.uint8))
            marked.append(quality(spoilt, clean).cpu())
        pictures.append(torch.cat(made))
        marks.append(torch.cat(marked))
    return Bank(torch.stack(pictures), torch.stack(marks), captions)
