"""Trajectory distillation as a kind of run: one LoRA (or UNet) a stage."""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.cards import UNetCard, save_unet_with_card
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.initial import fitting_lora
from hypersd_ray.models.lora_file import GUIDANCE, KEPT, LoRAMetadata
from hypersd_ray.models.roles import STUDENT
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds.base import (
    DISTILL_SAME_RUN,
    Kind,
    Place,
    build_roles,
    check_measure,
    distillation_grid,
    lora_file,
    save_loras,
    student_tensors,
    student_unet,
)
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.samples import Sampling


def build(config: TSCDConfig, place: Place) -> Distiller:
    """A distillation from the base, or from where another's first stage ended."""
    state = Distiller(config, *build_roles(config, place.device), place.rank)
    tensors = first_stage_lora(config)
    if tensors is not None:
        state.roles.load(STUDENT, tensors)
        state.next_stage()
    return state


def first_stage_lora(config: TSCDConfig) -> dict[str, torch.Tensor] | None:
    """The LoRA that stands for the first stage, right at the run's alpha; None where the run has its own.

    Raises:
        ValueError: it does not fit the teacher or lora.rank; one line.
    """
    if config.first_stage is None:
        return None
    with storage.local_copy(config.first_stage, "first_stage") as path:
        return fitting_lora(
            path, read_base(config.teacher), config.lora.rank, config.lora.effective_alpha, name="first_stage"
        )


def check(config: TSCDConfig) -> None:
    """The method's path exists in the base's noise schedule, and the first stage's LoRA fits.

    Raises:
        ConfigError: one line.
    """
    if config.distill.path == "straight" and read_base(config.teacher).schedule.alpha[-1] == 0:
        raise ConfigError(
            f"distill.path='straight' with teacher={config.teacher}: its schedule ends at alpha = 0, where no noise names "
            "a straight line; use distill.path='ode'"
        )
    check_measure(config)
    first_stage_lora(config)


def export(config: TSCDConfig, state: Distiller, stage: int, folder: Path | None) -> None:
    """The stage's LoRA in both layouts (or its UNet), usable at k steps."""
    k = config.distill.k_list[stage]
    if config.full_unet:
        whole = student_unet(state.roles)
        if folder is not None:
            where = f"{storage.run_folder(config.run)}/unet-k{k}"
            save_unet_with_card(whole, folder / f"unet-k{k}", where, unet_card(config, k))
        return
    if folder is None:
        return
    save_loras(student_tensors(state.roles), folder, lora_name(config, k), lora_metadata(config, k))


def unet_card(config: TSCDConfig, k: int) -> UNetCard:
    """What the card of the UNet of `k` segments says."""
    said = lora_metadata(config, k)
    return UNetCard(
        config.teacher, read_base(config.teacher), (), config.run.name, said.scheduler, k, config.distill.name, said.eta,
        said.extra,
    )  # fmt: skip


def lora_name(config: TSCDConfig, k: int) -> str:
    """Of the LoRA that the stage of `k` segments leaves."""
    return f"{config.distill.name}-k{k}"


def product(config: TSCDConfig, steps: int) -> str:
    """The LoRA of the stage that was made for `steps` steps: as many segments, or the next fewer, or the fewest."""
    return lora_file(lora_name(config, _made_for(config, steps)))


def _made_for(config: TSCDConfig, steps: int) -> int:
    """Segments of that stage."""
    k_list = config.distill.k_list
    return max((k for k in k_list if k <= steps), default=min(k_list))


def lora_metadata(config: TSCDConfig, k: int) -> LoRAMetadata:
    """What the LoRA of stage `k` says of itself: k steps first, then what else it can."""
    info = read_base(config.teacher)
    # A student that was asked at the segments' edges alone knows no other sampler than its own k steps.
    others = () if config.distill.start == "edges" else tuple(s for s in (1, 2, 4, 8) if s != k)
    return LoRAMetadata(
        base_model=info.name, family=info.family, k=k, steps=(k, *others), scheduler=scheduler_of(config, k),
        eta=eta_of(config, k), rank=config.lora.rank, alpha=config.lora.effective_alpha, recipe=config.run.name,
        extra={GUIDANCE: KEPT} if config.distill.keeps_guidance else {},
    )  # fmt: skip


def scheduler_of(config: TSCDConfig, k: int) -> str:
    """diffusers' scheduler for the student of `k` segments: it ends where the student was taught to jump to."""
    distill = config.distill
    if distill.target == "teacher":
        return "DDIMScheduler"  # the next edge, without noise
    if distill.t_end == "segment_start":
        return "LCMScheduler" if k == 1 else "DDIMScheduler"  # clean data, and noise again; or the next edge
    return "TCDScheduler"


def eta_of(config: TSCDConfig, k: int) -> float:
    """The noise put back between steps: all of it where the student only knows the way to clean data."""
    return 1.0 if scheduler_of(config, k) == "LCMScheduler" else 0.0


def samplings(config: TSCDConfig) -> list[Sampling]:
    """A student is good at k steps and does not fail at others; each number of steps as the student for it was taught."""
    distill = config.distill
    windows = distill.k_list[-1] if distill.path == "straight" else None
    return [
        Sampling(n, eta=eta_of(config, _made_for(config, n)), windows=windows if windows and n % windows == 0 else None)
        for n in (8, 4, 2, 1)
    ]


KIND = Kind(
    config=TSCDConfig,
    same_run=(*DISTILL_SAME_RUN, "first_stage"),
    check=check,
    build=build,
    export=export,
    grid=distillation_grid(samplings),
    product=product,
    samplings=samplings,
)
