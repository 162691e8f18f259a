"""Trajectory segmented consistency distillation as a kind of run: one LoRA (or UNet) a stage."""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import GUIDANCE, KEPT, LoRAMetadata, save_unet
from hypersd_ray.models.roles import STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.trainer.kinds.base import (
    DISTILL_SAME_RUN,
    Kind,
    Place,
    Sampling,
    distillation_batch,
    distillation_grid,
    save_loras,
    student_tensors,
)
from hypersd_ray.training.distiller import Distiller


def build_roles(config: TSCDConfig, device: torch.device | str) -> tuple[Roles, Conditioning]:
    """The base with its roles, and the unconditional input of guidance."""
    info = read_base(config.teacher)
    null = load_encoders(config.teacher, device="cpu", vae=False).null_conditioning().to(device)
    unet = load_unet(info, torch.bfloat16 if config.run.precision == "bf16" else torch.float32, device)
    parts = (unet, info.schedule, info.parameterization)
    roles = (
        FullRoles(*parts)
        if config.full_unet
        else LoRARoles(*parts, config.lora.rank, config.lora.effective_alpha, seed=config.run.seed)
    )
    if config.optim.checkpointing:
        roles.checkpoint_activations()
    return roles, null


def build(config: TSCDConfig, place: Place) -> Distiller:
    """A distillation from the base."""
    return Distiller(config, *build_roles(config, place.device), place.rank)


def export(config: TSCDConfig, state: Distiller, stage: int, folder: Path) -> None:
    """The stage's LoRA in both layouts (or its UNet), usable at k steps."""
    k = config.distill.k_list[stage]
    if config.full_unet:
        with state.roles.playing(STUDENT) as unet:
            save_unet(unet, folder / f"unet-k{k}")
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
