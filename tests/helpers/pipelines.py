"""Tiny random pipelines with the real topology of SD1.5 and SDXL, and the real UNet configs for the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hypersd_ray.embedded.text import MAX_TOKENS, train_tokenizer
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.shapes import SD15_UNET, SDXL_UNET

Family = Literal["sd", "sdxl"]

# The published shapes, narrow. Both end at 2x2: over one position attention knows no queries, their gradient would be 0.
TINY_SD = SD15_UNET | {
    "sample_size": 16,
    "block_out_channels": (32, 64, 96, 96),
    "norm_num_groups": 8,  # 32 groups of 32 channels would normalise the time embedding away
    "cross_attention_dim": 32,
}
# Two levels: a training step of it takes milliseconds.
MICRO_SD = TINY_SD | {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}
# SDXL's depth of 10 is 2 here: the same code runs 5 times less often.
TINY_SDXL = SDXL_UNET | {
    "sample_size": 8,
    "block_out_channels": (32, 64, 96),
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 32 + 48,  # both text encoders' widths, side by side
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 40,  # six sizes and the pooled embedding
}
POOLED = 40

CAPTIONS = [f"a {style} {thing} on a {colour} background" for style in ("drawn", "twemoji")
            for thing in ("panda", "red apple", "bicycle") for colour in ("pink", "green")]  # fmt: skip


def tiny_unet(family: Family, seed: int = 0) -> UNet2DConditionModel:
    """A random UNet of the family's topology, in evaluation mode, whose output depends on all it is told."""
    return _unet(TINY_SD if family == "sd" else TINY_SDXL, seed)


def micro_unet(seed: int = 0) -> UNet2DConditionModel:
    """A random UNet of Stable Diffusion's parts, 8x8 latents, small enough to train in a test."""
    return _unet(MICRO_SD, seed)


def _unet(config: dict, seed: int) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config).eval()


def _text_config(tokenizer: CLIPTokenizer, width: int, act: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, hidden_act=act, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_vae(family: Family) -> AutoencoderKL:
    """f8 of four levels, as the real one."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build_pipeline(family: Family, folder: Path, seed: int = 0, micro: bool = False) -> Path:
    """Save a tiny random pipeline of `family` to `folder`, laid out as the released ones; returns `folder`.

    `micro` (family "sd") takes the micro UNet.
    """
    tokenizer = train_tokenizer(CAPTIONS, vocabulary=620)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, 32, "quick_gelu", 32)).eval()
        vae = tiny_vae(family).eval()
        if family == "sd":
            StableDiffusionPipeline(
                vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=micro_unet(seed) if micro else tiny_unet("sd", seed),
                scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            ).save_pretrained(folder)  # fmt: skip
            return folder
        # As released: the second tokenizer pads with "!", the first with its end token.
        tokenizer_2 = train_tokenizer(CAPTIONS, vocabulary=620)
        tokenizer_2.pad_token = "!"
        StableDiffusionXLPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=tiny_unet("sdxl", seed),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer_2, 48, "gelu", POOLED)).eval(),
            tokenizer_2=tokenizer_2, scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
            force_zeros_for_empty_prompt=True,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def randomize(adapters: Adapters, role: str, seed: int = 0, size: float = 0.1) -> dict[str, Tensor]:
    """Fill `role` with random A and B (a fresh B is zero and would hide every mistake); returns copies of them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with torch.no_grad():
        for name, p in adapters.named_tensors(role).items():
            p.copy_(torch.randn(p.shape, generator=generator) * size)
            tensors[name] = p.detach().clone()
    return tensors


def random_inputs(family: Family, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    """x_t (B, 4, h, h), h = 16 (sd) or 8 (sdxl), t (B,) in 1..1000 and a conditioning for the tiny UNets."""
    g = torch.Generator().manual_seed(seed)
    size = (TINY_SD if family == "sd" else TINY_SDXL)["sample_size"]
    x_t = torch.randn(batch, 4, size, size, generator=g)
    t = torch.randint(1, 1001, (batch,), generator=g)
    if family == "sd":
        return x_t, t, Conditioning(torch.randn(batch, MAX_TOKENS, 32, generator=g))
    time_ids = torch.tensor([[1365.0, 1024.0, 0.0, 37.0, 1024.0, 1024.0]]).repeat(batch, 1)
    text = torch.randn(batch, MAX_TOKENS, 80, generator=g)
    return x_t, t, Conditioning(text, torch.randn(batch, POOLED, generator=g), time_ids)


def call(unet: torch.nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """diffusers' UNet as diffusers calls it, at our t."""
    return unet(x_t, t - 1, cond.prompt_embeds, added_cond_kwargs=cond.added_kwargs()).sample
