"""Text encoder(s) and autoencoder of a base model: captions and pixels in, what the UNet sees out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hypersd_ray.models.checkpoint import load_component, read_base
from hypersd_ray.models.conditioning import Conditioning


@dataclass(frozen=True)
class PromptEmbeddings:
    """prompt_embeds (B, L, D); pooled (B, P), SDXL only."""

    prompt_embeds: Tensor
    pooled: Tensor | None = None


class Encoders:
    """The frozen encoders of one base model.

    The autoencoder runs in float32 whatever `dtype` is: SDXL's overflows in half precision.
    """

    def __init__(
        self, tokenizers: list, text_encoders: list, vae: AutoencoderKL | None, zero_null_prompt: bool, device: str
    ):
        self.tokenizers, self.text_encoders = tokenizers, text_encoders
        self.vae: Any = vae  # None where only prompts are encoded
        self.zero_null_prompt, self.device = zero_null_prompt, device

    @property
    def is_sdxl(self) -> bool:
        """Two text encoders, pooled embedding, size conditioning."""
        return len(self.text_encoders) == 2

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> PromptEmbeddings:
        """Embeddings of `prompts`, padded or cut to the tokenizer's length."""
        if not self.is_sdxl:
            ids = self._tokens(self.tokenizers[0], prompts)
            return PromptEmbeddings(self.text_encoders[0](ids).last_hidden_state)
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            out = encoder(self._tokens(tokenizer, prompts), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled = out[0]  # the second encoder's projection is the one that SDXL uses
        return PromptEmbeddings(torch.cat(hidden, -1), pooled)

    def null_conditioning(self) -> Conditioning:
        """The unconditional input of guidance, batch 1: the empty prompt, or zeros where the base was trained so."""
        null = self.encode_prompts([""])
        if self.zero_null_prompt:
            null = PromptEmbeddings(
                torch.zeros_like(null.prompt_embeds), None if null.pooled is None else torch.zeros_like(null.pooled)
            )
        return Conditioning(null.prompt_embeds, null.pooled)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to scaled latents (B, C, h, w) float32: the posterior's mode, so that it is repeatable."""
        x = pixels.to(self.device, torch.float32) / 127.5 - 1
        return self.vae.encode(x).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to uint8 pixels (B, 3, H, W)."""
        x = self.vae.decode(latents.to(self.device, torch.float32) / self.vae.config.scaling_factor).sample
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _tokens(self, tokenizer, prompts: list[str]) -> Tensor:
        out = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return out.input_ids.to(self.device)


def load_encoders(
    model_path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", vae: bool = True
) -> Encoders:
    """Load the encoders of a diffusers pipeline folder.

    Raises:
        ValueError: the folder is not such a pipeline, or weights are missing.
    """
    info = read_base(model_path)
    two = ("", "_2") if info.family == "sdxl" else ("",)
    tokenizers = [_load_tokenizer(info.path / f"tokenizer{i}") for i in two]
    text_encoders = [
        load_component(
            CLIPTextModelWithProjection if i else CLIPTextModel, info.path / f"text_encoder{i}", dtype=dtype
        ).to(device)
        for i in two
    ]
    autoencoder = load_vae(info.path, device) if vae else None
    return Encoders(tokenizers, text_encoders, autoencoder, info.zero_null_prompt, device)


def load_vae(model_path: str | Path, device: str = "cpu") -> AutoencoderKL:
    """The autoencoder of a pipeline folder, float32. Raises ValueError: weights are missing."""
    return load_component(AutoencoderKL, Path(model_path) / "vae", torch_dtype=torch.float32).to(device)


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    # transformers makes an empty tokenizer of an empty folder, and one that is not there it seeks on the hub
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"{folder} holds no tokenizer.json or vocab.json: {folder.parent} must be a whole pipeline folder"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from error
