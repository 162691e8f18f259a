"""What differs between the kinds of training that run in the same loop: configuration, state, and what comes out."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hypersd_ray.actors.client import RemoteBackend
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import save_diffusers_lora, save_kohya_lora
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.models.roles import EMA, STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.models.scoring import RewardClient, local_backend
from hypersd_ray.models.zero import ZeroRoles
from hypersd_ray.trainer import storage
from hypersd_ray.training import samples
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.protocol import Training
from hypersd_ray.training.samples import Sampling

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
    export: Callable[[Any, Any, int, Path | None], None]
    grid: Callable[[Any, Any, Tensor, Conditioning], tuple[str, list[Tensor]]]
    product: Callable[[Any, int], str]
    samplings: Callable[[Any], Sequence[Sampling]]
    models: Callable[[Any], Sequence[RewardConfig | PerceptionConfig]] = lambda config: ()


def check_measure(config: TSCDConfig) -> None:
    """What quality is measured by is there. Raises ConfigError: one line."""
    clip = config.measure.clip if config.measure.prompts else None
    if clip is not None and not storage.exists(clip):
        raise ConfigError(f"measure.clip={clip} does not exist: name CLIP's folder or file, or leave it out")


def check_there(owner: object, prefix: str, *fields: str) -> None:
    """The files that fields of a section name are there. Raises ConfigError: one line."""
    for field in fields:
        if (path := getattr(owner, field)) and not storage.exists(path):
            raise ConfigError(f"{prefix}.{field}={path} does not exist")


def check_rewards(rewards: Sequence[RewardConfig], placement: PlacementConfig, section: str = "") -> None:
    """Every file of the rewards is there, and the interpreters; `section` is where the run has them, "feedback.".

    Raises:
        ConfigError: one line.
    """
    for reward in rewards:
        check_there(reward, f"{section}rewards.{reward.name}", "checkpoint", "tower", "tokenizer")
        apart = placement.where == "actors" and reward.python
        if apart and shutil.which(reward.python) is None:
            raise ConfigError(
                f"{section}rewards.{reward.name}.python={reward.python} is no interpreter: `python jobs/image_reward_env.py --out DIR` "
                "makes one, DIR/bin/python, at the same path on every node"
            )
        if reward.name == "image_reward_package" and not apart and importlib.util.find_spec("ImageReward") is None:
            raise ConfigError(
                f"{section}rewards.image_reward_package with placement.where={placement.where} and python={reward.python!r}: "
                "image-reward is not installed beside this project; `python jobs/image_reward_env.py --out DIR`, then "
                "--image-reward-python DIR/bin/python with placement.where=actors"
            )


def client_of(
    models: Sequence[RewardConfig | PerceptionConfig], placement: PlacementConfig, place: Place
) -> RewardClient:
    """A way to the shared actors where the run has them, else to models of this worker's own."""
    if place.evaluators is None:
        return RewardClient(local_backend(models, place.device, placement.precision))
    return RewardClient(RemoteBackend(place.evaluators, place.rank))


def build_roles(
    config: TSCDConfig, device: torch.device, begin: Callable[[UNet2DConditionModel], None] = lambda student: None
) -> tuple[Roles, Conditioning]:
    """The base with its roles, and the unconditional input of guidance.

    `begin` changes the student's UNet before it is trained in full, in float32.
    """
    info = read_base(config.teacher)
    null = load_encoders(config.teacher, device="cpu", vae=False).null_conditioning().to(device)
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32

    def whole() -> UNet2DConditionModel:
        return load_unet(info, torch.float32, "cpu")

    roles: Roles
    if config.zero.stage:
        student = whole()
        begin(student)
        how = (info.schedule, info.parameterization, dtype, device, config.optim, config.zero)
        roles = ZeroRoles(whole, student, *how)
    elif config.full_unet:
        roles = FullRoles(load_unet(info, dtype, device), info.schedule, info.parameterization)
        with roles.playing(STUDENT) as network:
            begin(network)
        roles.copy(STUDENT, EMA)
    else:
        parts = (load_unet(info, dtype, device), info.schedule, info.parameterization)
        roles = LoRARoles(*parts, config.lora.rank, config.lora.effective_alpha, seed=config.run.seed)
    if config.optim.checkpointing:
        roles.checkpoint_activations()
    return roles, null


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
