"""Small parts that the tests of one-step training share."""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import LoRARoles
from hypersd_ray.training.onestep import OneStep
from hypersd_ray.training.tscd import Batch
from tests.helpers.pipelines import micro_unet, random_inputs, tiny_unet


def config(folder: Path, **changes) -> OneStepConfig:
    """A run of a few steps; `changes` are fields, sections as dicts."""
    init = folder / "init.safetensors"
    init.touch()
    fields = {
        "teacher": str(folder),
        "init": str(init),
        "data": DataConfig(shards="x.tar"),
        "distill": {"k_list": (1,), "n_list": (20,), "steps_list": (6,), "omega_min": 2, "omega_max": 3},
        "dmd": {"guidance": 2.0, "fake_updates": 2, "warmup_share": 0.0},
        "lora": {"rank": 4},
        "optim": {"lr": 1e-3, "batch": 4},
    }
    for name, value in changes.items():
        fields[name] = fields[name] | value if isinstance(fields.get(name), dict) else value
    return OneStepConfig.model_validate(fields)


def inputs(rows: int = 4, seed: int = 0, family: str = "sd") -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """x_t (B, 4, 8, 8), t (B,) and a conditioning."""
    x_t, t, cond = random_inputs(family, rows, seed)
    return x_t[..., :8, :8].contiguous(), t, cond


def batch_of(rows: int = 4, seed: int = 0, family: str = "sd") -> Batch:
    """Random latents and captions."""
    x0, _, cond = inputs(rows, seed, family)
    return Batch(x0, cond)


def null_of(family: str = "sd") -> Conditioning:
    """An unconditional input."""
    cond = random_inputs(family, 1, seed=99)[2]
    return Conditioning(torch.zeros_like(cond.prompt_embeds), None if cond.pooled is None else cond.pooled * 0)


def one_step(settings: OneStepConfig, family: str = "sd", rank: int = 0) -> OneStep:
    """The training step on a small random UNet."""
    unet = micro_unet() if family == "sd" else tiny_unet(family)
    roles = LoRARoles(unet, scaled_linear(), "epsilon", settings.lora.rank, settings.lora.effective_alpha)
    return OneStep(settings, roles, null_of(family), rank)


def copies(training: OneStep, role: str) -> list[torch.Tensor]:
    """The role's tensors as they are now."""
    return [p.detach().clone() for p in training.roles.named_tensors(role).values()]


def differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether any element is another."""
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
