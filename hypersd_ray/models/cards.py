"""A model card for a distilled UNet folder, with the lines that use it in diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusers import UNet2DConditionModel

from hypersd_ray.models.checkpoint import BaseInfo
from hypersd_ray.models.export import PIPELINES, sampling_arguments, save_unet


@dataclass(frozen=True)
class UNetCard:
    """What a card says.

    Attributes:
        base: where the base model lies.
        info: what it is.
        timesteps: the network's inputs of its steps, where it was made for those alone.
        recipe: the run that made it.
        scheduler: diffusers' class to sample with.
        k: segments of the stage that made it, where it is for so many steps; None for one of 1 to 8 steps, or of
            `timesteps`.
        method: that stage's.
        eta, extra: as in a LoRA's metadata.
    """

    base: str
    info: BaseInfo
    timesteps: tuple[int, ...]
    recipe: str
    scheduler: str
    k: int | None = None
    method: str = ""
    eta: float = 0.0
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the lines that use it."""
        return len(self.timesteps) or self.k or 4


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
        scheduler, timesteps = str(said["scheduler"]), tuple(int(t) for t in said["timesteps"])
        return UNetSampling(scheduler, timesteps, float(said.get("eta", 0.0)), dict(said.get("extra", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def unet_usage(folder: str | Path, card: UNetCard) -> str:
    """Python that puts the UNet in `folder` into its base's pipeline and samples as it was meant."""
    pipeline = PIPELINES[card.info.family]
    scheduler = card.scheduler
    grid, call = sampling_arguments(scheduler, card.steps, card.timesteps, card.eta, card.extra)
    return "\n".join(
        (
            f"from diffusers import {scheduler}, {pipeline}, UNet2DConditionModel",
            f"unet = UNet2DConditionModel.from_pretrained({str(folder)!r})",
            f"pipe = {pipeline}.from_pretrained({card.base!r}, unet=unet)",
            f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{grid})",
            f'image = pipe("a prompt", {call}).images[0]',
        )
    )


def save_unet_with_card(unet: UNet2DConditionModel, folder: Path, where: str, card: UNetCard) -> Path:
    """`save_unet`, and a README.md and how it is sampled (`read_sampling`) beside it; `where` is the folder's final place,
    which the lines name."""
    save_unet(unet, folder)
    said = UNetSampling(card.scheduler, card.timesteps, card.eta, dict(card.extra))
    (folder / SAMPLING).write_text(json.dumps(asdict(said)) + "\n")
    name = card.info.name
    several = len(card.timesteps) > 1
    how = (
        "score distillation"
        if several
        else "trajectory segmented consistency distillation and distribution matching (Hyper-SD)"
    )
    if card.k is not None:
        steps, how = f"{card.k} step{'s' * (card.k > 1)}", f"trajectory distillation (`{card.method}`)"
        told = f"It is sampled with {card.scheduler}."
    elif not card.timesteps:
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
        f"to {steps} by {how}, recipe `{card.recipe}`. {told}\n\n```python\n{unet_usage(where, card)}\n```\n"
    )
    return folder
