"""A model card for a distilled UNet folder, with the lines that use it in diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import UNet2DConditionModel

from hypersd_ray.models.checkpoint import BaseInfo
from hypersd_ray.models.export import PIPELINES, TCD_GRID, save_unet


@dataclass(frozen=True)
class UNetCard:
    """What a card says.

    Attributes:
        base: where the base model lies.
        info: what it is.
        timesteps: the network's inputs of its steps, where it was made for those alone; empty for one of 1 to 8 steps.
        recipe: the run that made it.
    """

    base: str
    info: BaseInfo
    timesteps: tuple[int, ...]
    recipe: str

    @property
    def scheduler(self) -> str:
        """diffusers' class to sample with."""
        return "LCMScheduler" if self.timesteps else "TCDScheduler"


SAMPLING = "sampling.json"
"""Beside a UNet's config.json: how it is meant to be sampled."""


@dataclass(frozen=True)
class UNetSampling:
    """What a UNet's folder says of that, as `LoRAMetadata` says it of a LoRA. `timesteps` as in `UNetCard`."""

    scheduler: str
    timesteps: tuple[int, ...]
    eta: float = 0.0
    extra: dict[str, str] = field(default_factory=dict)


def read_sampling(folder: Path) -> UNetSampling | None:
    """None where the folder says nothing: another project's.

    Raises:
        ValueError: it cannot be read; one line.
    """
    path = folder / SAMPLING
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text())
        return UNetSampling(str(said["scheduler"]), tuple(int(t) for t in said["timesteps"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def unet_usage(folder: str | Path, card: UNetCard) -> str:
    """Python that puts the UNet in `folder` into its base's pipeline and samples as it was meant."""
    pipeline = PIPELINES[card.info.family]
    scheduler = card.scheduler
    if not card.timesteps:
        grid, call = f", original_inference_steps={TCD_GRID}", "num_inference_steps=4, eta=0.0"
    else:
        grid, call = "", f"num_inference_steps={len(card.timesteps)}, timesteps={list(card.timesteps)}"
    return "\n".join(
        (
            f"from diffusers import {scheduler}, {pipeline}, UNet2DConditionModel",
            f"unet = UNet2DConditionModel.from_pretrained({str(folder)!r})",
            f"pipe = {pipeline}.from_pretrained({card.base!r}, unet=unet)",
            f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{grid})",
            f'image = pipe("a prompt", {call}, guidance_scale=0).images[0]',
        )
    )


def save_unet_with_card(unet: UNet2DConditionModel, folder: Path, where: str, card: UNetCard) -> Path:
    """`save_unet`, and a README.md and how it is sampled (`read_sampling`) beside it; `where` is the folder's final place,
    which the lines name."""
    save_unet(unet, folder)
    (folder / SAMPLING).write_text(json.dumps({"scheduler": card.scheduler, "timesteps": card.timesteps}) + "\n")
    name = card.info.name
    several = len(card.timesteps) > 1
    how = (
        "score distillation"
        if several
        else "trajectory segmented consistency distillation and distribution matching (Hyper-SD)"
    )
    if not card.timesteps:
        steps, told = "1 to 8 steps", "Its single step runs at time step 999; more steps add detail."
    else:
        inputs = ", ".join(map(str, card.timesteps))
        steps = f"{len(card.timesteps)} steps" if several else "one step"
        told = (
            f"The network is told time step{'s' * several} {inputs} and sees pure noise{' first' * several}; other numbers of "
            "steps are not what it was trained for."
        )
    (folder / "README.md").write_text(
        f"---\nbase_model: {name}\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags:\n- hyper-sd\n- distillation\n"
        f"---\n\n# {name} in {steps}\n\nUNet of {name} ({card.info.family}, {card.info.parameterization} prediction), distilled "
        f"to {steps} without guidance by {how}, recipe `{card.recipe}`. {told}\n\n```python\n{unet_usage(where, card)}\n```\n"
    )
    return folder
