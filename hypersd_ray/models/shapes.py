"""The published UNets' shapes, for what needs no weights: plans, tests of names and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypersd_ray.models.checkpoint import FAMILIES, Family

# stable-diffusion-v1-5, unet/config.json, beside what diffusers assumes
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {"block_out_channels": (128, 256, 512, 512)}
"""Of both, as much of it as plans ask for."""
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def write_shape(folder: Path, family: Family) -> None:
    """Of a pipeline folder the files that `read_base` reads, with the published shape; no weights."""
    unet = SDXL_UNET if family == "sdxl" else SD15_UNET
    pipeline = next(name for name, one in FAMILIES.items() if one == family)
    for file, content in (
        ("model_index.json", {"_class_name": pipeline}),
        ("unet/config.json", unet | {"in_channels": 4}),
        ("vae/config.json", VAE),
        ("scheduler/scheduler_config.json", SCHEDULE),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
