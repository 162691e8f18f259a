"""Recipes of trajectory distillation: a base model, and a method of `hypersd_ray/recipes/trajectory.py` on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hypersd_ray.config.data import DataConfig, EncoderPool
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig, LoRAConfig, OptimConfig, RunConfig, TSCDConfig
from hypersd_ray.embedded import paths

TINY_PROMPTS = (
    "a noto penguin on a yellow background",
    "a twemoji red apple on a sky background",
    "a noto pizza on a blue background",
    "a twemoji cat face on a purple background",
    "a noto cactus on a pink background",
    "a twemoji sailboat on a white background",
    "a noto tropical fish on a teal background",
    "a noto strawberry and a noto lemon on a white background",
)


def tiny(budget: Literal["minutes", "full"] = "minutes") -> TSCDConfig:
    """The embedded model, on a CPU: "minutes" is a first look, "full" the recipe of the committed LoRAs (half an hour on two free cores)."""
    full = budget == "full"
    return TSCDConfig(
        teacher=str(paths.TEACHER),
        data=DataConfig(
            shards=str(paths.DATA / "train-*.tar"),
            resolution=32,
            cache="disk",
            encoder=EncoderPool(batch_size=64),
        ),
        distill=DistillConfig(
            steps_list=(1200, 1000, 1200, 1600) if full else (160, 160, 160, 160),
            omega_min=2,
            omega_max=4,
            perturbation=0.0,
        ),
        adversarial=AdversarialConfig(adv_end=0.0, mse_end=1.0),
        lora=LoRAConfig(rank=32),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-{budget}", checkpoint_every=200, log_every=10, prompts=TINY_PROMPTS),
    )


def sd15(teacher: str, shards: str = "data/*.tar") -> TSCDConfig:
    """Stable Diffusion 1.5 at 512 px with the paper's settings (batch 512, lr 1e-6, k = 8, 4, 2, 1) on 8 GPUs."""
    return TSCDConfig(
        teacher=teacher,
        data=DataConfig(
            shards=shards, resolution=512, encoder=EncoderPool(num_gpus=0.25, max_size=4, dtype="bfloat16")
        ),
        distill=DistillConfig(omega_min=3, omega_max=8),
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4),
        run=RunConfig(name="sd15", workers=8, gpus_per_worker=1, precision="bf16"),
    )


def sdxl(teacher: str, shards: str = "data/*.tar") -> TSCDConfig:
    """SDXL at 1024 px with the paper's settings on 32 GPUs."""
    return TSCDConfig(
        teacher=teacher,
        data=DataConfig(
            shards=shards,
            resolution=1024,
            encoder=EncoderPool(num_gpus=0.5, max_size=8, batch_size=8, dtype="bfloat16"),
        ),
        distill=DistillConfig(omega_min=5, omega_max=8),
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4),
        run=RunConfig(name="sdxl", workers=32, gpus_per_worker=1, precision="bf16"),
    )


RECIPES: dict[str, Callable[..., TSCDConfig]] = {"tiny": tiny, "sd15": sd15, "sdxl": sdxl}
