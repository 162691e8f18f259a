"""From prompts to pictures by any model, in three timed parts: text encoder, UNet, autoencoder.

Shapes: x_T, latents (B, C, h, w); pictures uint8 (B, 3, H, W).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from evaluation.harness.prompts import Row
from evaluation.harness.subjects import Cell
from hypersd_ray.diffusion.guidance import guide
from hypersd_ray.models.checkpoint import load_component, load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning, concatenate, square_time_ids
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.lora_file import alpha_of, read_lora
from hypersd_ray.models.roles import STUDENT, Plain
from hypersd_ray.models.samplers import diffusers_scheduler
from hypersd_ray.training import samples
from hypersd_ray.training.randomness import generator_of

PARTS = ("text", "unet", "vae")
"""Of a picture's making."""


@dataclass(frozen=True, eq=False)
class Made:
    """pictures uint8 and latents, on the CPU; seconds of each part."""

    pictures: Tensor
    latents: Tensor
    seconds: dict[str, float]


class Sampler:
    """A base model in memory, and whichever LoRA or UNet it was last asked for, merged into it.

    Raises:
        ValueError: the base cannot be loaded.
    """

    def __init__(self, base: str, device: str = "cpu", dtype: str = "float32"):
        self.info, self.device, self.dtype = read_base(base), device, getattr(torch, dtype)
        self.encoders = load_encoders(base, self.dtype, device)
        self.unet = load_unet(self.info, self.dtype, device)
        self.bare = {name: p.detach().cpu().clone() for name, p in self.unet.state_dict().items()}
        self.loaded = ""
        size = self.unet.config.sample_size
        self.shape, self.side = (self.unet.config.in_channels, size, size), size * self.info.latent_factor
        self.null = self.encoders.null_conditioning()

    @property
    def roles(self) -> Plain:
        """The network as it is now, in our time."""
        return Plain(self.unet, self.info.schedule, self.info.parameterization)

    def load(self, cell: Cell) -> None:
        """Make the UNet that of `cell`. Raises ValueError when its weights do not fit the base."""
        if cell.weights_sha256 == self.loaded:
            return
        self.loaded = "?"  # should the next lines fail
        self.unet.load_state_dict(self.bare)
        if cell.kind == "lora":
            tensors, metadata = read_lora(cell.weights)
            merge_lora(self.unet, tensors, alpha_of(tensors, metadata))
        elif cell.kind == "unet":
            from pathlib import Path

            other = load_component(UNet2DConditionModel, Path(cell.weights), torch_dtype=self.dtype)
            try:
                self.unet.load_state_dict(other.state_dict())
            except RuntimeError as error:
                raise ValueError(f"{cell.weights} does not fit {cell.base}: {str(error).splitlines()[0]}") from None
        self.loaded = cell.weights_sha256

    @torch.no_grad()
    def __call__(self, cell: Cell, rows: Sequence[Row]) -> Made:
        """One picture of each row. Each is a function of (cell, row), whatever it is batched with."""
        self.load(cell)
        seconds: dict[str, float] = {}
        keys = [row.key for row in rows]
        with _timed(seconds, "text", self.device):
            cond = self.conditioning([row.prompt for row in rows])
        x_T = samples.start_noise(cell.seed, keys, self.shape).to(self.device)
        with _timed(seconds, "unet", self.device):
            latents = self.sample(cell, x_T, cond, keys)
        with _timed(seconds, "vae", self.device):
            pictures = self.encoders.decode(latents)
        return Made(pictures.cpu(), latents.float().cpu(), seconds)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is called with."""
        embeds = self.encoders.encode_prompts(list(prompts))
        ids = square_time_ids(self.side, len(prompts), self.device) if self.encoders.is_sdxl else None
        return Conditioning(embeds.prompt_embeds, embeds.pooled, ids)

    def sample(self, cell: Cell, x_T: Tensor, cond: Conditioning, keys: Sequence[str]) -> Tensor:
        """The cell's latents."""
        how, roles = cell.how, self.roles
        if how.scheduler != "edges":
            return self._by_diffusers(cell, x_T, cond, keys)
        denoiser = roles.denoiser(STUDENT, cond)
        if how.guidance > 1:
            scale = torch.full((len(x_T),), how.guidance, device=x_T.device)
            denoiser = roles.guided(STUDENT, cond, self.null, scale)
        sampling = samples.Sampling(cell.steps, how.times, how.eta, how.windows)
        return samples.sample(roles.schedule, denoiser, x_T, sampling, cell.seed, keys)

    def _by_diffusers(self, cell: Cell, x_T: Tensor, cond: Conditioning, keys: Sequence[str]) -> Tensor:
        """The loop of diffusers' pipelines around one of its schedulers."""
        how = cell.how
        scheduler = diffusers_scheduler(how.scheduler, self.info.path, how.timesteps or ())
        if how.timesteps is not None:
            scheduler.set_timesteps(timesteps=list(how.timesteps))
        else:
            scheduler.set_timesteps(cell.steps)
        options: dict[str, Any] = {"generator": [generator_of(cell.seed, "eta", key) for key in keys]}
        if how.scheduler == "ddim":
            options = {}
        elif how.scheduler == "tcd":
            options["eta"] = how.eta
        x = x_T * scheduler.init_noise_sigma
        predict = self._network(cond, how.guidance)
        for t in scheduler.timesteps:
            output = predict(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **options, return_dict=False)[0]
        # LCMScheduler's and TCDScheduler's last step leaves clean data first
        return x

    def _network(self, cond: Conditioning, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The UNet's raw output, guided where that is asked for."""
        whole = cond
        if guidance > 1:
            null = self.null.with_time_ids(None).expand(len(cond.prompt_embeds)).with_time_ids(cond.time_ids)
            whole = concatenate(cond, null)
        whole = whole.cast(self.dtype)

        def call(x: Tensor, t: Tensor) -> Tensor:
            both = x if guidance <= 1 else x.repeat(2, 1, 1, 1)
            added = whole.added_kwargs()
            output = self.unet(both.to(self.dtype), t, whole.prompt_embeds, added_cond_kwargs=added).sample.float()
            if guidance <= 1:
                return output
            scale = torch.full((len(x),), guidance, device=x.device)
            conditional, null = output.chunk(2)
            return guide(conditional, null, scale)

        return call


class _timed:
    """Seconds of a block into a dictionary; a GPU is waited for."""

    def __init__(self, into: dict[str, float], name: str, device: str):
        self.into, self.name, self.cuda = into, name, device.startswith("cuda")

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.into[self.name] = time.perf_counter() - self.begun
