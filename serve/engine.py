"""Few-step sampling of a batch on one device: the model's side of the application, without Ray.

Shapes: x (B, C, h, w) latents float32; t () the network's index 0..999; pictures uint8 (H, W, 3) numpy.

An image is a function of its seed, prompt and settings: its noise comes from a CPU generator of its own, drawn as
diffusers' pipelines draw it from `generator=[torch.Generator().manual_seed(seed), ...]`, so what it is batched with
changes nothing but the rounding inside matrix products.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

from hypersd_ray.diffusion.guidance import guide
from hypersd_ray.diffusion.parameterization import to_prediction
from hypersd_ray.models.checkpoint import load_component, load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning, concatenate, size_time_ids
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.samplers import SCHEDULERS, diffusers_scheduler
from serve.catalog import Catalog
from serve.lora_switch import HotLoRA, LoRASwitch, load_hot_lora
from serve.settings import NO_LORA, ModelSettings
from serve.work import BatchKey, Shot

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OnPreview = Callable[[int, int, np.ndarray], None]
"""(place in the batch, step counted from 1, picture)."""


class Abandoned(Exception):
    """Nobody waits for any image of the batch any more."""


@dataclass
class BatchResult:
    """Pictures in the order of the shots, and seconds by stage."""

    pictures: list[np.ndarray]
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """A base model, its ControlNets, and the LoRA that is merged now."""

    def __init__(self, settings: ModelSettings, catalog: Catalog):
        """Load everything but the LoRAs.

        Raises:
            ValueError: weights are missing or do not fit, or the device is not there.
        """
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("model.device=cuda, and this replica sees no GPU: set denoiser.gpus, or model.device=cpu")
        self.settings, self.catalog = settings, catalog
        self.device, self.dtype = torch.device(device), DTYPES[settings.dtype]
        self.info = read_base(catalog.base)
        self.encoders = load_encoders(catalog.base, self.dtype, device)
        self.unet = load_unet(self.info, self.dtype, self.device)
        self.switch = LoRASwitch(self.unet)
        self.controlnets = {
            name: load_component(ControlNetModel, Path(folder), torch_dtype=self.dtype).to(self.device)
            for name, folder in catalog.controlnets.items()
        }
        self.schedulers = {kind.__name__: diffusers_scheduler(name, catalog.base) for name, kind in SCHEDULERS.items()}
        # Requests are counted on one thread while another encodes: a fast tokenizer cannot be borrowed twice.
        self._counting = copy.deepcopy(self.encoders.tokenizers[0])
        self._factor = self.info.latent_factor
        self._lock = threading.Lock()

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that the text encoder reads, start and end not counted."""
        return self._counting.model_max_length - 2

    def count_tokens(self, prompt: str) -> int:
        """Tokens of `prompt`, start and end not counted."""
        return len(self._counting(prompt, add_special_tokens=False, verbose=False).input_ids)

    def load_lora(self, name: str) -> HotLoRA:
        """The LoRA of the catalogue, onto the device; raises ValueError when it cannot be read."""
        lora = self.catalog.lora(name)
        assert lora is not None, f"LoRA {name} is not in the catalogue"
        return load_hot_lora(name, lora.path, self.device)

    def run(
        self,
        key: BatchKey,
        shots: Sequence[Shot],
        lora: HotLoRA | None = None,
        on_preview: OnPreview | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> BatchResult:
        """Make the images of `shots`, which share `key`; `lora` is the one that the key names.

        Raises:
            ValueError: the LoRA does not fit the base.
            Abandoned: `wanted` said no, between two steps.
        """
        assert (lora.name if lora else NO_LORA) == key.lora, f"LoRA {lora} for key {key}"
        with self._lock, torch.inference_mode():
            return self._run_split(key, shots, lora, on_preview, wanted)

    def _run_split(
        self,
        key: BatchKey,
        shots: Sequence[Shot],
        lora: HotLoRA | None,
        on_preview: OnPreview | None,
        wanted: Callable[[], bool] | None,
    ) -> BatchResult:
        """The batch, or its halves one after the other where the device has not the memory for it."""
        try:
            return self._run(key, shots, lora, on_preview, wanted)
        except torch.OutOfMemoryError:
            if len(shots) == 1:
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(shots) // 2
        shifted = None if on_preview is None else lambda i, step, picture: on_preview(half + i, step, picture)
        first = self._run_split(key, shots[:half], lora, on_preview, wanted)
        second = self._run_split(key, shots[half:], lora, shifted, wanted)
        names = dict.fromkeys([*first.seconds, *second.seconds])
        seconds = {name: first.seconds.get(name, 0.0) + second.seconds.get(name, 0.0) for name in names}
        return BatchResult(first.pictures + second.pictures, seconds)

    def _run(
        self,
        key: BatchKey,
        shots: Sequence[Shot],
        lora: HotLoRA | None,
        on_preview: OnPreview | None,
        wanted: Callable[[], bool] | None,
    ) -> BatchResult:
        clock = _Clock(self.device)
        self.switch.use(lora, key.lora_scale)
        cond, null = self._conditioning(key, shots)
        clock.lap("text")
        x = self._denoise(key, shots, cond, null, clock, on_preview, wanted)
        clock.lap("denoise")
        pictures = self._decode(x)
        clock.lap("decode")
        return BatchResult(pictures, clock.seconds)

    def _conditioning(self, key: BatchKey, shots: Sequence[Shot]) -> tuple[Conditioning, Conditioning | None]:
        """Of the prompts, and of the negative ones where the batch is guided."""
        ids = size_time_ids(key.height, key.width, len(shots), self.device) if self.encoders.is_sdxl else None
        texts = self.encoders.encode_prompts([shot.prompt for shot in shots])
        cond = Conditioning(texts.prompt_embeds, texts.pooled, ids)
        if not key.guided:
            return cond, None
        negative = [shot.negative_prompt for shot in shots]
        texts = self.encoders.encode_prompts(negative)
        embeds, pooled = texts.prompt_embeds, texts.pooled
        if self.encoders.zero_null_prompt:
            kept = torch.tensor([float(bool(text)) for text in negative], device=self.device, dtype=embeds.dtype)
            embeds = embeds * kept.view(-1, 1, 1)
            pooled = None if pooled is None else pooled * kept.view(-1, 1)
        return cond, Conditioning(embeds, pooled, ids)

    def _denoise(
        self,
        key: BatchKey,
        shots: Sequence[Shot],
        cond: Conditioning,
        null: Conditioning | None,
        clock: _Clock,
        on_preview: OnPreview | None,
        wanted: Callable[[], bool] | None,
    ) -> Tensor:
        """x_0 (B, C, h, w) in `key.steps` steps of the scheduler that the LoRA was made for."""
        generators = [torch.Generator().manual_seed(shot.seed) for shot in shots]
        shape = (1, self.info.latent_channels, key.height // self._factor, key.width // self._factor)
        x = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        network = self._network(key, shots, cond, null)
        scheduler, how = self._sampler(key)
        for step, t in enumerate(scheduler.timesteps, start=1):
            if wanted is not None and not wanted():
                raise Abandoned
            output = network(x, t)
            shown = [i for i, shot in enumerate(shots) if step in shot.show_after]
            if shown and on_preview is not None:
                clock.lap("denoise")
                self._show(x[shown], output[shown], t, step, shown, on_preview)
                clock.lap("preview")
            x = scheduler.step(output, t, x, generator=generators, return_dict=False, **how)[0]
        return x

    def _sampler(self, key: BatchKey) -> tuple[Any, dict[str, float]]:
        """The scheduler with its timesteps set, and what its `step` takes beside the usual."""
        lora = self.catalog.lora(key.lora)
        named = self.catalog.sampler(key.lora)
        scheduler = self.schedulers[named]
        if lora is not None and lora.timesteps:
            scheduler.set_timesteps(timesteps=list(lora.timesteps), device=self.device)
        else:
            scheduler.set_timesteps(key.steps, device=self.device)
        return scheduler, {} if named == "LCMScheduler" else {"eta": key.eta}

    def _network(
        self, key: BatchKey, shots: Sequence[Shot], cond: Conditioning, null: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, t) -> the network's output float32 (B, C, h, w), guided if the key says so."""
        both = (concatenate(cond, null) if null is not None else cond).cast(self.dtype)
        times = 1 if null is None else 2
        scale = torch.tensor([shot.guidance for shot in shots], device=self.device)
        hint = self._hint(shots, times) if key.control else None

        def call(x: Tensor, t: Tensor) -> Tensor:
            given = x.to(self.dtype).repeat(times, 1, 1, 1)
            extra = {} if hint is None else self._control(str(key.control), given, t, both, *hint)
            embeds, added = both.prompt_embeds, both.added_kwargs()
            out = self.unet(given, t, embeds, added_cond_kwargs=added, return_dict=False, **extra)[0].float()
            if null is None:
                return out
            with_prompt, without = out.chunk(2)
            return guide(with_prompt, without, scale)

        return call

    def _hint(self, shots: Sequence[Shot], times: int) -> tuple[Tensor, Tensor]:
        """The ControlNet's pictures (times B, 3, H, W) in 0..1, and their strengths."""
        pixels = torch.from_numpy(np.stack([shot.control for shot in shots]))  # type: ignore[misc]
        pixels = (pixels.to(self.device).permute(0, 3, 1, 2).float() / 255).to(self.dtype)
        scale = torch.tensor([shot.control_scale for shot in shots], device=self.device, dtype=self.dtype)
        return pixels.repeat(times, 1, 1, 1), scale.repeat(times).view(-1, 1, 1, 1)

    def _control(
        self, name: str, x: Tensor, t: Tensor, cond: Conditioning, pixels: Tensor, scale: Tensor
    ) -> dict[str, object]:
        """The residuals that the ControlNet adds to the UNet's."""
        down, mid = self.controlnets[name](
            x, t, cond.prompt_embeds, pixels, added_cond_kwargs=cond.added_kwargs(), return_dict=False
        )
        return {
            "down_block_additional_residuals": [scale * part for part in down],
            "mid_block_additional_residual": scale * mid,
        }

    def _show(self, x: Tensor, output: Tensor, t: Tensor, step: int, places: list[int], on_preview: OnPreview) -> None:
        """What x_0 looks like from here."""
        alpha_t, sigma_t = self._alphas(t)
        x0 = to_prediction(output, x, alpha_t, sigma_t, self.info.parameterization).x0
        for place, picture in zip(places, self._decode(x0), strict=True):
            on_preview(place, step, picture)

    def _alphas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.schedulers["TCDScheduler"].alphas_cumprod[t.cpu()].to(self.device)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _decode(self, x: Tensor) -> list[np.ndarray]:
        parts = [self.encoders.decode(part).cpu() for part in x.split(self.settings.decode_batch)]
        return list(torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy())


class _Clock:
    """Seconds from lap to lap; waits for the device first."""

    def __init__(self, device: torch.device):
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}
        self._wait()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
