"""Read a diffusers pipeline folder: which family it is, its schedule, its UNet. Safetensors only, never the network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import UNet2DConditionModel

from hypersd_ray.diffusion.parameterization import Parameterization
from hypersd_ray.diffusion.schedule import Schedule, from_scheduler_config

# Bars of a tenth of a second for every component of every process; the trainer has its own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

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
    def name(self) -> str:
        """What to call it in metadata: the hub's name of a snapshot, the place in the checkout, else the folder's name."""
        for part in self.path.parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/")
        checkout, folder = Path(__file__).resolve().parents[2], self.path.resolve()
        return folder.relative_to(checkout).as_posix() if folder.is_relative_to(checkout) else folder.name

    @property
    def latent_factor(self) -> int:
        """Pixels of a picture's side to one of its latents'."""
        config = _json(self.path / "vae" / "config.json")
        return 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.unet_config["in_channels"]


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} does not exist: --teacher must be a folder in diffusers' layout (model_index.json, unet/, ...)"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # JSON's, or bytes that are not text
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


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
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler = _json(scheduler_file)
    parameterization = scheduler.get("prediction_type", "epsilon")
    if parameterization not in get_args(Parameterization):
        accepted = ", ".join(get_args(Parameterization))
        raise ValueError(f"{scheduler_file}: prediction_type={parameterization!r} is not one of {accepted}")
    try:
        schedule = from_scheduler_config(scheduler)
    except ValueError as error:
        raise ValueError(f"{scheduler_file}: {error}") from None
    return BaseInfo(
        path=path,
        family=FAMILIES[name],
        schedule=schedule,
        parameterization=cast(Parameterization, parameterization),
        unet_config=_json(path / "unet" / "config.json"),
        zero_null_prompt=FAMILIES[name] == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def load_component(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` with every weight the config asks for, in evaluation mode, frozen.

    Raises:
        ValueError: the weights are missing or do not fit the config, in one line.
    """
    if not (folder / "config.json").is_file():  # the libraries would ask the hub for it
        raise ValueError(f"{folder}/config.json does not exist: {folder.parent} must be a whole pipeline folder")
    try:
        network, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    # Both libraries only warn here, and go on with random (or no) numbers.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: the weights lack {len(missing)} tensors its config asks for (first {missing[0]})")
    return network.eval().requires_grad_(False)


def load_unet(info: BaseInfo, dtype: torch.dtype, device: torch.device | str) -> UNet2DConditionModel:
    """The UNet in evaluation mode, frozen.

    Raises:
        ValueError: the weights are missing or do not fit the config.
    """
    return load_component(UNet2DConditionModel, info.path / "unet", torch_dtype=dtype).to(device)
