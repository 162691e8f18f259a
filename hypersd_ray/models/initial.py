"""The LoRA that a run starts from: whether it fits the base, found out from its file and the base's JSON alone."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hypersd_ray.models.checkpoint import BaseInfo
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import rank_of, read_lora


def fitting_lora(
    path: Path, info: BaseInfo, rank: int | None = None, alpha: float | None = None, name: str = "init"
) -> dict[str, Tensor]:
    """The tensors of the LoRA at `path`, scaled so that they are right at `alpha` (None: alpha = rank).

    `rank` is the run's; None accepts any (a LoRA that is merged into a UNet). `name` is the setting that names the file.
    No weight of the base is loaded.

    Raises:
        ValueError: of another family, another rank or another base; one line that names the file and the setting.
    """
    tensors, metadata = read_lora(path)
    if metadata is not None and metadata.family != info.family:
        raise ValueError(
            f"{name}={path} is a LoRA for {metadata.family} ({metadata.base_model}), teacher={info.path} is {info.family}: "
            "give a LoRA that was distilled from this teacher"
        )
    found = rank_of(tensors)
    if rank is not None and found != rank:
        raise ValueError(f"{name}={path} has rank {found}, lora.rank is {rank}: set lora.rank to {found}")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(info.unet_config)
    adapters = Adapters(unet, found, found)
    adapters.add("init", trainable=False)
    try:
        adapters.load("init", tensors)  # onto the meta device: names and shapes are held together, nothing is copied
    except ValueError as error:
        raise ValueError(f"{name}={path}: {error}") from None
    scale = (found if metadata is None else metadata.alpha) / (found if alpha is None else alpha)
    return {n: t * scale if scale != 1 and n.endswith("lora_B.weight") else t for n, t in tensors.items()}
