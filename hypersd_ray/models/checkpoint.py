"""Read a diffusers pipeline folder: which family it is, its schedule, its UNet. Safetensors only, never the network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.diffusion.parameterization import Parameterization
from hypersd_ray.diffusion.schedule import Schedule, from_scheduler_config

Family = Literal["sd", "sdxl"]

FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}


@dataclass(frozen=True)
class BaseInfo:
    """What the JSON files of a pipeline folder say, without loading a weight."""

    path: Path
    family: Family
    schedule: Schedule
    parameterization: Parameterization
    unet_config: dict
    zero_null_prompt: bool
    """SDXL: the empty prompt's embedding is zeros (`force_zeros_for_empty_prompt`)."""

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.unet_config["in_channels"]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: --teacher must be a folder in diffusers' layout (model_index.json, unet/, vae/, ...)"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_base(path: str | Path) -> BaseInfo:
    """Read a pipeline folder's JSON files.

    Raises:
        ValueError: not a Stable Diffusion or SDXL pipeline folder, or a schedule that cannot be distilled.
    """
    path = Path(path)
    index = _json(path / "model_index.json")
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{path}/model_index.json is a {name}; accepted: {', '.join(FAMILIES)}")
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    return BaseInfo(
        path=path,
        family=FAMILIES[name],
        schedule=from_scheduler_config(scheduler),
        parameterization=cast(Parameterization, scheduler.get("prediction_type", "epsilon")),
        unet_config=_json(path / "unet" / "config.json"),
        zero_null_prompt=FAMILIES[name] == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def load_unet(info: BaseInfo, dtype: torch.dtype, device: torch.device | str) -> UNet2DConditionModel:
    """The UNet in evaluation mode, frozen.

    Raises:
        ValueError: the weights are missing or do not fit the config.
    """
    try:
        unet = UNet2DConditionModel.from_pretrained(
            info.path / "unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{info.path}/unet cannot be loaded: {str(error).splitlines()[0]}") from error
    return unet.to(device).eval().requires_grad_(False)
