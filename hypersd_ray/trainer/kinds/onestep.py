"""Score distillation as a kind of run: a LoRA for 1 to 8 steps, or a model for the single step or a few."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.models.cards import UNetCard, save_unet_with_card
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.encoders import load_vae
from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.initial import fitting_lora
from hypersd_ray.models.lora_file import TIMESTEP, LoRAMetadata, rank_of
from hypersd_ray.models.roles import EMA, STUDENT
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds.base import (
    DISTILL_SAME_RUN,
    Kind,
    Place,
    build_roles,
    check_measure,
    check_rewards,
    client_of,
    distillation_grid,
    lora_file,
    save_loras,
    student_tensors,
    student_unet,
)
from hypersd_ray.training.onestep import OneStep
from hypersd_ray.training.rewarded import Rewarded
from hypersd_ray.training.samples import Sampling


def initial_lora(config: OneStepConfig) -> dict[str, Tensor] | None:
    """The LoRA that the run starts from, right at the run's alpha; None where it starts from the base.

    Raises:
        ValueError: it does not fit the teacher or lora.rank; one line.
    """
    if config.init is None:
        return None
    info = read_base(config.teacher)
    rank, alpha = (None, None) if config.full_unet else (config.lora.rank, config.lora.effective_alpha)
    with storage.local_copy(config.init, "init") as path:
        return fitting_lora(path, info, rank, alpha)


def build(config: OneStepConfig, place: Place) -> OneStep:
    """Score distillation from a TSCD LoRA (merged into the student's UNet where that is trained in full), or the base."""
    tensors = initial_lora(config)

    def begin(student: UNet2DConditionModel) -> None:
        if tensors is not None:
            merge_lora(student, tensors, alpha=rank_of(tensors))

    roles, null = build_roles(config, place.device, begin)
    if tensors is not None and not config.full_unet:
        roles.load(STUDENT, tensors)
        roles.copy(STUDENT, EMA)
    return OneStep(config, roles, null, place.rank, rewarded(config, place))


def rewarded(config: OneStepConfig, place: Place) -> Rewarded | None:
    """What judges the single step's pictures, where the run has feedback."""
    feedback = config.feedback
    if not feedback.rewards:
        return None
    vae = load_vae(config.teacher, str(place.device)).eval().requires_grad_(False)
    return Rewarded(
        feedback.rewards, vae, client_of(feedback.rewards, feedback.placement, place), feedback.decode_batch
    )


def check(config: OneStepConfig) -> None:
    """The LoRA fits, and what rewards and quality are read from is there.

    Raises:
        ValueError, ConfigError: one line.
    """
    initial_lora(config)
    check_measure(config)
    check_rewards(config.feedback.rewards, config.feedback.placement, "feedback.")


def onestep_name(config: OneStepConfig) -> str:
    """The products' name: `onestep-unified`, `onestep-t800` for a model of the single step alone, or `fewstep-4`."""
    if config.mode == "few":
        return f"fewstep-{len(config.starts)}"
    return f"onestep-{'unified' if config.mode == 'unified' else f't{config.t_input - 1}'}"


def product(config: OneStepConfig, steps: int) -> str:
    """The run's only LoRA, whatever the number of steps."""
    return lora_file(onestep_name(config))


def onestep_metadata(config: OneStepConfig) -> LoRAMetadata:
    """What the LoRA of a one-step run says of itself."""
    info, unified = read_base(config.teacher), config.mode == "unified"
    steps = tuple(range(1, 9)) if unified else (len(config.starts),)
    return LoRAMetadata(
        base_model=info.name, family=info.family, k=1, steps=steps,
        scheduler="TCDScheduler" if unified else "LCMScheduler", eta=1.0 if config.mode == "few" else 0.0, rank=config.lora.rank,
        alpha=config.lora.effective_alpha, recipe=config.run.name,
        extra={} if unified else {TIMESTEP: ", ".join(str(t - 1) for t in config.starts)},
    )  # fmt: skip


def onestep_card(config: OneStepConfig) -> UNetCard:
    """What the card of the run's UNet says."""
    timesteps = () if config.mode == "unified" else tuple(t - 1 for t in config.starts)
    info, scheduler = read_base(config.teacher), onestep_metadata(config).scheduler
    return UNetCard(config.teacher, info, timesteps, config.run.name, scheduler)


def export(config: OneStepConfig, state: OneStep, stage: int, folder: Path | None) -> None:
    """The LoRA in both layouts; where the single step is all it can, the merged UNet too. In full training the UNet."""
    name, where = onestep_name(config), f"{storage.run_folder(config.run)}/unet-{onestep_name(config)}"
    if config.full_unet:
        whole = student_unet(state.roles)
        if folder is not None:
            save_unet_with_card(whole, folder / f"unet-{name}", where, onestep_card(config))
        return
    if folder is None:
        return
    tensors = student_tensors(state.roles)
    save_loras(tensors, folder, name, onestep_metadata(config))
    if config.mode == "dedicated":
        unet = load_unet(read_base(config.teacher), torch.float32, "cpu")
        merge_lora(unet, {n: p.detach().cpu() for n, p in tensors.items()}, config.lora.effective_alpha)
        save_unet_with_card(unet, folder / f"unet-{name}", where, onestep_card(config))


def samplings(config: OneStepConfig) -> list[Sampling]:
    """The steps that the run trains; of several also fewer, evenly chosen."""
    if config.mode == "unified":
        return [Sampling(n) for n in (8, 4, 2, 1)]
    starts = config.starts
    chosen = {n: tuple(starts[i * len(starts) // n] for i in range(n)) for n in (8, 4, 2, 1) if n <= len(starts)}
    return [Sampling(n, (*times, 0), eta=1.0 if n > 1 else 0.0) for n, times in chosen.items()]


SAME_RUN = (
    *DISTILL_SAME_RUN, "init", "mode", "timestep", "timesteps", "inputs", "consistency_share", "dmd", "regression.pairs",
    "regression.weight", "regression.batch", "feedback.rewards", "feedback.weight",
)  # fmt: skip

KIND = Kind(
    config=OneStepConfig,
    same_run=SAME_RUN,
    check=check,
    build=build,
    export=export,
    grid=distillation_grid(samplings),
    product=product,
    samplings=samplings,
    models=lambda config: config.models if config.placement.where == "actors" else (),
)
