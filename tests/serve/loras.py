"""LoRA files of random tensors, large enough to be seen."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata

RANK = 4


def write_lora(
    folder: Path,
    name: str,
    unet: UNet2DConditionModel,
    k: int,
    seed: int,
    guidance: bool = False,
    family: str = "sd",
    timestep: str = "",
    scheduler: str = "TCDScheduler",
) -> Path:
    """A LoRA of random tensors for `unet` (which stays as it is), with our metadata."""
    with torch.device("meta"):
        shapes = Adapters(UNet2DConditionModel.from_config(unet.config), RANK, 8.0)
    shapes.add("student", trainable=False)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in shapes.named_tensors("student").items()}
    metadata = LoRAMetadata(
        base_model="tiny", family=family, k=k, steps=(k,), scheduler=scheduler, eta=1.0 if scheduler == "LCMScheduler" else 0.0, rank=RANK, alpha=8.0,
        extra=({"guidance": "kept"} if guidance else {}) | ({"timestep": timestep} if timestep else {}),
    )  # fmt: skip
    return save_diffusers_lora(tensors, folder / f"{name}.safetensors", metadata)
