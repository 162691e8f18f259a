"""Feedback learning as a kind of run: a feedback LoRA, and its merge with the TSCD LoRA it was trained above."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.diffusion.segments import edges
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_vae
from hypersd_ray.models.initial import fitting_lora
from hypersd_ray.models.lora_file import LoRAMetadata, rank_of, read_lora
from hypersd_ray.models.merge import Part, concatenate_loras
from hypersd_ray.models.perception.coco import CocoAnnotations, crop_square
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.roles import STUDENT, TEACHER
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.kinds.base import (
    COMMON_SAME_RUN,
    Kind,
    Place,
    check_rewards,
    check_there,
    client_of,
    lora_file,
    save_loras,
    student_tensors,
)
from hypersd_ray.training import samples
from hypersd_ray.training.feedback import Annotations, Feedback, build_roles
from hypersd_ray.training.samples import Sampling

FEEDBACK, MERGED = "feedback", "feedback-merged"
"""The products' names: the feedback LoRA alone, and the exact merge of the TSCD LoRA with it."""


def check(config: FeedbackConfig) -> None:
    """The LoRA fits the base, and every file that a model is read from is there.

    Raises:
        ValueError, ConfigError: one line.
    """
    with storage.local_copy(config.tscd, "tscd") as path:
        fitting_lora(path, read_base(config.teacher), name="tscd")
        check_times(config, read_lora(path)[1])
    check_rewards(config.rewards, config.placement)
    if config.structure.weight:
        check_there(config.structure.model, "structure.model", "checkpoint")
        check_there(config.structure, "structure", "annotations")
        if config.structure.annotations:
            CocoAnnotations(config.structure.annotations)


def check_times(config: FeedbackConfig, tscd: LoRAMetadata | None) -> None:
    """A LoRA that was made for some of the network's inputs alone is asked at no other.

    Raises:
        ConfigError: one line.
    """
    made = tscd.timesteps if tscd else ()
    asked = {t - 1 for steps in config.refl.steps for t in edges(1000, steps)[1:]}
    if config.structure.weight:
        asked |= {t - 1 for t in config.structure.times()}
    if made and not asked <= set(made):
        raise ConfigError(
            f"tscd={config.tscd} was made for the time step{'s' * (len(made) > 1)} {', '.join(map(str, made))} alone, this run "
            f"asks it at {', '.join(map(str, sorted(asked, reverse=True)))}: give a LoRA of 1 to 8 steps, or change refl.steps"
            + (", structure.start and structure.denoise_to" if config.structure.weight else "")
        )


def build(config: FeedbackConfig, place: Place) -> Feedback:
    """The TSCD model with a fresh feedback LoRA, and a way to the judges."""
    with storage.local_copy(config.tscd, "tscd") as tscd:
        roles = build_roles(config.model_copy(update={"tscd": str(tscd)}), place.device)
    vae = load_vae(config.teacher, str(place.device)).eval().requires_grad_(False)
    client = client_of(config.models, config.placement, place)
    tell = place.tell if place.rank == 0 else lambda line: None  # once
    return Feedback(config, roles, vae, client, read_annotations(config), place.rank, tell)


def read_annotations(config: FeedbackConfig) -> Annotations | None:
    """Each picture's objects at the training resolution, by its key in the shards."""
    if not config.structure.weight or not config.structure.annotations:
        return None
    coco, resolution = CocoAnnotations(config.structure.annotations), config.data.resolution

    def annotation(key: str) -> Instances | None:
        name = key.rpartition("/")[2]
        return crop_square(coco.instances(name), resolution) if name in coco else None

    return annotation


def tscd_metadata(config: FeedbackConfig, found: LoRAMetadata | None, rank: int) -> LoRAMetadata:
    """What the TSCD LoRA says of itself; what the run knows of it where its file says nothing."""
    info, steps = read_base(config.teacher), tuple(sorted(config.refl.steps))
    return found or LoRAMetadata(info.name, info.family, 1, steps, "TCDScheduler", 0.0, rank, float(rank))


def export(config: FeedbackConfig, state: Feedback, stage: int, folder: Path | None) -> None:
    """The feedback LoRA, and the exact merge with the TSCD LoRA, each in both layouts."""
    if folder is None:
        return
    with storage.local_copy(config.tscd, "tscd") as path:
        tensors, found = read_lora(path)
    tscd = tscd_metadata(config, found, rank_of(tensors))
    feedback = {name: p.detach().cpu() for name, p in student_tensors(state.roles).items()}
    alpha, recipe = config.lora.effective_alpha, config.run.name
    above = tscd.extra | {"above": Path(config.tscd).name}
    alone = replace(tscd, rank=config.lora.rank, alpha=alpha, recipe=recipe, extra=above)
    save_loras(feedback, folder, FEEDBACK, alone)
    merged = concatenate_loras(
        [Part(tensors, tscd.alpha, 1.0, "tscd"), Part(feedback, alpha, config.merge_weight, "feedback")]
    )
    said = tscd.extra | {"merged": f"{Path(config.tscd).name} + {config.merge_weight:g} x {recipe}"}
    save_loras(
        merged.tensors, folder, MERGED, replace(tscd, rank=merged.rank, alpha=merged.alpha, recipe=recipe, extra=said)
    )


def grid(config: FeedbackConfig, state: Feedback, x_T: Tensor, cond: Conditioning) -> tuple[str, list[Tensor]]:
    """The TSCD model, which the bare base is here, over the same with feedback, at the trained numbers of steps."""
    steps = sorted(config.refl.steps)
    rows = [samples.student_samples(state.roles, role, x_T, cond, n) for n in steps for role in (TEACHER, STUDENT)]
    return "steps" + "".join(map(str, steps)) + "_tscd_feedback", rows


KIND = Kind(
    config=FeedbackConfig,
    same_run=(*COMMON_SAME_RUN, "tscd", "steps", "rewards", "refl", "structure", "drift"),
    check=check,
    build=build,
    export=export,
    grid=grid,
    product=lambda config, steps: lora_file(MERGED),
    samplings=lambda config: [Sampling(n) for n in sorted(config.refl.steps, reverse=True)],
    models=lambda config: config.models if config.placement.where == "actors" else (),
)
