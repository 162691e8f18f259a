"""A distillation of the micro UNet: configs, distillers, batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.schedule import from_scheduler_config
from hypersd_ray.embedded.text import MAX_TOKENS
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.protocol import Checkpointed
from hypersd_ray.training.tscd import Batch
from tests.helpers.pipelines import BETAS, micro_unet

BATCH = 4

MSE_ONLY = {"adv_end": 0.0, "mse_end": 1.0}
ADVERSARIAL = {"adv_start": 0.1, "adv_end": 0.2, "mse_end": 0.5, "warmup_share": 0.0, "lr": 1e-3}

# The methods that this one generalises, as settings of `distill` with one stage.
SETTINGS: dict[str, dict[str, Any]] = {
    "PD": {"k_list": (1,), "t_end": "two_steps", "target": "teacher"},
    "LCM": {"k_list": (1,), "t_end": "segment_start", "target": "student"},
    "CTM": {"k_list": (1,), "t_end": "uniform", "target": "ema"},
    "TSCD": {"k_list": (4,), "t_end": "uniform", "target": "ema"},
}


def student_parameters(roles: Roles) -> list[nn.Parameter]:
    """What a step trains."""
    return list(roles.named_tensors(STUDENT).values())


def make_config(teacher: Any, **overrides: Any) -> TSCDConfig:
    """Two stages (k = 2, 1) of 4 steps of 4 images, MSE only, lr 1e-3; `teacher` any folder; `section={...}` changes."""
    values: dict[str, Any] = {
        "teacher": str(teacher),
        "data": {"shards": "unused.tar"},
        "distill": {"k_list": (2, 1), "n_list": (8, 8), "steps_list": (4, 4), "omega_min": 2, "omega_max": 4},
        "adversarial": MSE_ONLY,
        "lora": {"rank": 4},
        "optim": {"lr": 1e-3, "batch": BATCH},
    }
    for name, value in overrides.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return TSCDConfig.model_validate(values)


def one_stage(teacher: Any, setting: str, **overrides: Any) -> TSCDConfig:
    """`make_config` with one stage of N = 8 by a name of SETTINGS."""
    distill = {"n_list": (8,), "steps_list": (4,), **SETTINGS[setting], **overrides.pop("distill", {})}
    return make_config(teacher, distill=distill, **overrides)


def make_roles(config: TSCDConfig, seed: int = 0) -> Roles:
    """On the micro UNet; `seed` is the adapter's first A, the base is always the same."""
    schedule = from_scheduler_config(dict(BETAS))
    if config.full_unet:
        return FullRoles(micro_unet(), schedule, "epsilon")
    return LoRARoles(micro_unet(), schedule, "epsilon", config.lora.rank, config.lora.effective_alpha, seed=seed)


def make_distiller(config: TSCDConfig, rank: int = 0, seed: int = 0) -> Distiller:
    """With a null conditioning that is not any prompt's."""
    return Distiller(config, make_roles(config, seed), Conditioning(torch.full((1, MAX_TOKENS, 32), 0.3)), rank)


def make_batch(index: int = 0, size: int = BATCH) -> Batch:
    """Random latents and captions, a function of `index`."""
    g = torch.Generator().manual_seed(1000 + index)
    return Batch(torch.randn(size, 4, 8, 8, generator=g), Conditioning(torch.randn(size, MAX_TOKENS, 32, generator=g)))


def disturb(roles: Roles, role: str, seed: int, size: float = 0.05) -> None:
    """Move a role away from the base: at the start all roles are the teacher, and every mistake is invisible."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in roles.named_tensors(role).values():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * size)


def snapshot(training: Checkpointed, moments: bool = False) -> dict[str, Tensor]:
    """Copies of all weights that training changes, `{part}/{name}`; with `moments`, these alone."""
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in training.parts()
        for name, tensor in tensors.items()
        if part.endswith("-moments") == moments
    }


class InMemory:
    """The parts of a state, kept to load another one from."""

    folder = Path("/nowhere")

    def __init__(self, training: Checkpointed):
        self.kept = {part: {n: t.clone() for n, t in tensors.items()} for part, tensors in training.parts()}
        self.notes = copy.deepcopy(training.notes())

    def __call__(self, part: str) -> dict[str, Tensor]:
        return self.kept[part]

    def into(self, training: Checkpointed) -> None:
        """Load."""
        training.load(self, self.notes)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_stages(distiller: Distiller, until: int | None = None) -> None:
    """Step (as the trainer's loop does) until the run is finished or `until` steps are done over all stages."""
    steps = distiller.config.distill.steps_list
    while not distiller.finished:
        done = sum(steps[: distiller.progress.stage]) + distiller.progress.step
        if done == until:
            return
        distiller.step(make_batch(done))
        if distiller.progress.step == distiller.steps:
            distiller.next_stage()
