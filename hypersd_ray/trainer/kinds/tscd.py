"""Trajectory segmented consistency distillation as a kind of run: one LoRA (or UNet) a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import GUIDANCE, KEPT, LoRAMetadata, save_unet
from hypersd_ray.models.roles import EMA, STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.models.zero import ZeroRoles
from hypersd_ray.trainer.kinds.base import (
    DISTILL_SAME_RUN,
    Kind,
    Place,
    Sampling,
    distillation_batch,
    distillation_grid,
    save_loras,
    student_tensors,
    student_unet,
)
from hypersd_ray.training.distiller import Distiller


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


def build(config: TSCDConfig, place: Place) -> Distiller:
    """A distillation from the base."""
    return Distiller(config, *build_roles(config, place.device), place.rank)


def export(config: TSCDConfig, state: Distiller, stage: int, folder: Path | None) -> None:
    """The stage's LoRA in both layouts (or its UNet), usable at k steps."""
    k = config.distill.k_list[stage]
    if config.full_unet:
        whole = student_unet(state.roles)
        if folder is not None:
            save_unet(whole, folder / f"unet-k{k}")
        return
    if folder is None:
        return
    save_loras(student_tensors(state.roles), folder, f"tscd-k{k}", lora_metadata(config, k))


def lora_metadata(config: TSCDConfig, k: int) -> LoRAMetadata:
    """What the LoRA of stage `k` says of itself: k steps first, then what else it can."""
    info = read_base(config.teacher)
    steps = (k, *(s for s in (1, 2, 4, 8) if s != k))
    return LoRAMetadata(
        base_model=info.path.name, family=info.family, k=k, steps=steps, scheduler="TCDScheduler", eta=0.0,
        rank=config.lora.rank, alpha=config.lora.effective_alpha, recipe=config.run.name,
        extra={GUIDANCE: KEPT} if config.distill.keeps_guidance else {},
    )  # fmt: skip


def samplings(config: TSCDConfig) -> list[Sampling]:
    """A student is good at k steps and does not fail at others."""
    return [(n, None) for n in (8, 4, 2, 1)]


KIND = Kind(
    TSCDConfig,
    DISTILL_SAME_RUN,
    lambda config: None,
    build,
    distillation_batch,
    export,
    distillation_grid(samplings),
)
