"""What differs between the kinds of training that run in the same loop: configuration, state, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.export import save_diffusers_lora, save_kohya_lora
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.models.roles import STUDENT, Roles
from hypersd_ray.training import samples
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.protocol import Training
from hypersd_ray.training.samples import Sampling
from hypersd_ray.training.tscd import Batch

AnyConfig = TSCDConfig | FeedbackConfig
"""A run's configuration."""

COMMON_SAME_RUN = (
    "teacher", "lora", "run.seed", "data.shards", "data.resolution", "data.shards_per_window", "data.shuffle_rows",
)  # fmt: skip
"""Fields that a resumed run must share with the run it resumes: without them its weights, its randomness or its place
in the data mean something else."""
DISTILL_SAME_RUN = (*COMMON_SAME_RUN, "full_unet", "distill", "adversarial")
"""Those of a distillation."""


@dataclass(frozen=True)
class Place:
    """Where a worker stands: its device, its rank, the shared models' actors where the run has some, and who takes a line
    that the user should read."""

    device: torch.device
    rank: int
    evaluators: Any = None
    tell: Callable[[str], None] = print


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Attributes:
        config: its configuration's class.
        same_run: fields that a resumed run must share with the run it resumes.
        check: finds out before anything starts what cannot work; raises ValueError or ConfigError.
        build: (config, Place) -> the training state of one worker.
        batch: (rows of a stream, device) -> what `step` takes first.
        export: (config, state, stage, folder) writes the products of a stage into an empty folder; all ranks call it,
            for weights may be gathered, and but for rank 0 with None for a folder.
        grid: (config, state, x_T, cond) -> name and rows of latents of a sample grid.
        product: (config, steps) -> the LoRA in the run's folder that is meant for sampling in `steps` steps.
        samplings: config -> how its students are sampled.
        models: config -> the models that shared actors hold for all workers.
    """

    config: type[AnyConfig]
    same_run: tuple[str, ...]
    check: Callable[[Any], Any]
    build: Callable[[Any, Place], Training]
    batch: Callable[[dict[str, Any], torch.device], Any]
    export: Callable[[Any, Any, int, Path | None], None]
    grid: Callable[[Any, Any, Tensor, Conditioning], tuple[str, list[Tensor]]]
    product: Callable[[Any, int], str]
    samplings: Callable[[Any], Sequence[Sampling]]
    models: Callable[[Any], Sequence[RewardConfig | PerceptionConfig]] = lambda config: ()


def distillation_batch(rows: dict[str, Any], device: torch.device) -> Batch:
    """Latents, their conditioning, captions and keys."""
    return Batch.from_rows(rows, device)


def distillation_grid(samplings: Callable[[Any], Sequence[Sampling]]) -> Callable:
    """Teacher at 25 steps over the student at its own numbers of steps."""

    def grid(config: TSCDConfig, state: Distiller, x_T: Tensor, cond: Conditioning) -> tuple[str, list[Tensor]]:
        omega = (config.distill.omega_min + config.distill.omega_max) / 2
        chosen = samplings(config)
        rows = [samples.teacher_samples(state.roles, x_T, cond, state.null, 25, omega)]
        rows += [samples.student_samples(state.roles, STUDENT, x_T, cond, how) for how in chosen]
        return f"teacher25_student{''.join(str(how.steps) for how in chosen)}", rows

    return grid


def student_unet(roles: Roles) -> UNet2DConditionModel:
    """The student trained in full, whole; where it is shared out all ranks ask, and only rank 0's has weights."""
    tensors = roles.gather(STUDENT)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(roles.unet.config)
    unet.load_state_dict(tensors, strict=False, assign=True)
    return unet


def lora_file(name: str) -> str:
    """Where a run keeps the LoRA `name` in diffusers' layout, in its folder."""
    return f"lora/{name}.safetensors"


def save_loras(tensors: dict[str, Tensor], folder: Path, name: str, metadata: LoRAMetadata) -> None:
    """`lora_file(name)` in `folder`, and in Kohya's layout beside it."""
    tensors = {name: p.detach().cpu() for name, p in tensors.items()}
    for layout, save in (("", save_diffusers_lora), ("-kohya", save_kohya_lora)):
        save(tensors, folder / lora_file(f"{name}{layout}"), metadata)


def student_tensors(roles: Roles) -> dict[str, Tensor]:
    """The student's LoRA."""
    return dict(roles.named_tensors(STUDENT))
