"""What differs between the kinds of training that run in the same loop: configuration, state, and what comes out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.cards import UNetCard, save_unet_with_card
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import (
    TIMESTEP,
    LoRAMetadata,
    merge_lora,
    save_diffusers_lora,
    save_kohya_lora,
    save_unet,
)
from hypersd_ray.models.initial import fitting_lora
from hypersd_ray.models.roles import EMA, STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.trainer import storage
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.onestep import OneStep

Sampling = tuple[int, Sequence[int] | None]
"""Steps, and the times they run at where these are not the training edges."""


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Attributes:
        config: its configuration's class.
        same_run: fields of its own that a resumed run must share with the run it resumes.
        check: finds out before anything starts what cannot work; raises ValueError or ConfigError.
        build: (config, device, rank) -> the training state of one worker.
        export: (config, roles, stage, folder) writes the products of a stage into an empty folder.
        samplings: how the student of a run is sampled in the grids.
    """

    config: type[TSCDConfig]
    same_run: tuple[str, ...]
    check: Callable
    build: Callable
    export: Callable
    samplings: Callable


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


def build_tscd(config: TSCDConfig, device: torch.device, rank: int) -> Distiller:
    """A distillation from the base."""
    return Distiller(config, *build_roles(config, device), rank)


def export_tscd(config: TSCDConfig, roles: Roles, stage: int, folder: Path) -> None:
    """The stage's LoRA in both layouts (or its UNet), usable at k steps."""
    k = config.distill.k_list[stage]
    if config.full_unet:
        with roles.playing(STUDENT) as unet:
            save_unet(unet, folder / f"unet-k{k}")
        return
    _save_loras(roles, folder, f"tscd-k{k}", lora_metadata(config, k))


def _save_loras(roles: Roles, folder: Path, name: str, metadata: LoRAMetadata) -> None:
    tensors = {name: p.detach().cpu() for name, p in roles.named_tensors(STUDENT).items()}
    for layout, save in (("", save_diffusers_lora), ("-kohya", save_kohya_lora)):
        save(tensors, folder / "lora" / f"{name}{layout}.safetensors", metadata)


def lora_metadata(config: TSCDConfig, k: int) -> LoRAMetadata:
    """What the LoRA of stage `k` says of itself: k steps first, then what else it can."""
    info = read_base(config.teacher)
    steps = (k, *(s for s in (1, 2, 4, 8) if s != k))
    return LoRAMetadata(
        base_model=info.path.name, family=info.family, k=k, steps=steps, scheduler="TCDScheduler", eta=0.0,
        rank=config.lora.rank, alpha=config.lora.effective_alpha, recipe=config.run.name, extra={},
    )  # fmt: skip


def initial_lora(config: OneStepConfig) -> dict[str, Tensor]:
    """The LoRA that the run starts from, right at the run's alpha.

    Raises:
        ValueError: it does not fit the teacher or lora.rank; one line.
    """
    info = read_base(config.teacher)
    rank, alpha = (None, None) if config.full_unet else (config.lora.rank, config.lora.effective_alpha)
    if not storage.is_url(config.init):
        return fitting_lora(Path(config.init), info, rank, alpha)
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / Path(config.init).name
        if not storage.exists(config.init):
            raise ValueError(f"init={config.init} does not exist: name the LoRA that jobs/tscd.py made")
        storage.get(config.init, local)
        return fitting_lora(local, info, rank, alpha)


def build_onestep(config: OneStepConfig, device: torch.device, rank: int) -> OneStep:
    """One-step enhancement from a TSCD LoRA, merged into the student's UNet where that is trained in full."""
    roles, null = build_roles(config, device)
    tensors = initial_lora(config)
    if config.full_unet:
        with roles.playing(STUDENT) as unet:
            merge_lora(unet, tensors, alpha=next(t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")))
    else:
        roles.load(STUDENT, tensors)
    roles.copy(STUDENT, EMA)
    return OneStep(config, roles, null, rank)


def onestep_name(config: OneStepConfig) -> str:
    """The products' name: `onestep-unified`, or `onestep-t800` for a model of the single step alone."""
    return f"onestep-{'unified' if config.mode == 'unified' else f't{config.t_input - 1}'}"


def onestep_metadata(config: OneStepConfig) -> LoRAMetadata:
    """What the LoRA of a one-step run says of itself."""
    info, unified = read_base(config.teacher), config.mode == "unified"
    return LoRAMetadata(
        base_model=info.path.name, family=info.family, k=1, steps=tuple(range(1, 9)) if unified else (1,),
        scheduler="TCDScheduler" if unified else "LCMScheduler", eta=0.0, rank=config.lora.rank,
        alpha=config.lora.effective_alpha, recipe=config.run.name,
        extra={} if unified else {TIMESTEP: str(config.t_input - 1)},
    )  # fmt: skip


def onestep_card(config: OneStepConfig) -> UNetCard:
    """What the card of the run's UNet says."""
    timestep = None if config.mode == "unified" else config.t_input - 1
    return UNetCard(config.teacher, read_base(config.teacher), timestep, config.run.name)


def export_onestep(config: OneStepConfig, roles: Roles, stage: int, folder: Path) -> None:
    """The LoRA in both layouts; where the single step is all it can, the merged UNet too. In full training the UNet."""
    name, where = onestep_name(config), f"{storage.run_folder(config.run)}/unet-{onestep_name(config)}"
    if config.full_unet:
        with roles.playing(STUDENT) as unet:
            save_unet_with_card(unet, folder / f"unet-{name}", where, onestep_card(config))
        return
    _save_loras(roles, folder, name, onestep_metadata(config))
    if config.mode == "dedicated":
        unet = load_unet(read_base(config.teacher), torch.float32, "cpu")
        tensors = {n: p.detach().cpu() for n, p in roles.named_tensors(STUDENT).items()}
        merge_lora(unet, tensors, config.lora.effective_alpha)
        save_unet_with_card(unet, folder / f"unet-{name}", where, onestep_card(config))


def onestep_samplings(config: OneStepConfig) -> list[Sampling]:
    """The single step where that is all the run trains."""
    return [(n, None) for n in (8, 4, 2, 1)] if config.mode == "unified" else [(1, (config.t_input, 0))]


KINDS = {
    "tscd": Kind(
        TSCDConfig,
        (),
        lambda config: None,
        build_tscd,
        export_tscd,
        lambda config: [(n, None) for n in (8, 4, 2, 1)],
    ),
    "onestep": Kind(
        OneStepConfig,
        ("init", "mode", "timestep", "consistency_share", "dmd", "regression"),
        initial_lora,
        build_onestep,
        export_onestep,
        onestep_samplings,
    ),
}


def kind_of(config: TSCDConfig) -> str:
    """The name of a configuration's kind."""
    return next(name for name, kind in KINDS.items() if kind.config is type(config))
