"""Recipes of one-step enhancement (paper, Sec. 3.3), and of few-step models by score distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hypersd_ray.config.onestep import DMDConfig, OneStepConfig
from hypersd_ray.config.tscd import DistillConfig, OptimConfig, RunConfig
from hypersd_ray.recipes.tscd import TINY_PROMPTS, sd15, sdxl, tiny

Mode = Literal["unified", "dedicated"]


def onestep_tiny(init: str, mode: Mode = "unified", budget: Literal["minutes", "full"] = "minutes") -> OneStepConfig:
    """The embedded model, on a CPU, from the LoRA of `jobs/tscd.py tiny`: minutes, or "full" for the committed one."""
    base, steps = tiny(), 4000 if budget == "full" else 400
    return OneStepConfig(
        teacher=base.teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(
            k_list=(1,), n_list=(40,), steps_list=(steps,), omega_min=2, omega_max=4, perturbation=0.0
        ),
        dmd=DMDConfig(guidance=3.0, fake_updates=3, fake_lr=1e-3),
        lora=base.lora,
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-onestep-{mode}", checkpoint_every=100, log_every=10, prompts=TINY_PROMPTS),
    )


def onestep_sd15(teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified") -> OneStepConfig:
    """Stable Diffusion 1.5 from a TSCD LoRA on 8 GPUs; what the paper leaves open as DMD2 has it."""
    base = sd15(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=3, omega_max=8),
        dmd=DMDConfig(guidance=1.75, fake_updates=10),
        lora=base.lora,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4, clip=10.0),
        run=base.run.model_copy(update={"name": f"sd15-onestep-{mode}"}),
    )


def onestep_sdxl(teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified") -> OneStepConfig:
    """SDXL at 1024 px from a TSCD LoRA on 32 GPUs; what the paper leaves open as DMD2 has it."""
    base = sdxl(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=5, omega_max=8),
        dmd=DMDConfig(guidance=8.0, fake_updates=5),
        lora=base.lora,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=8, clip=10.0),
        run=base.run.model_copy(update={"name": f"sdxl-onestep-{mode}"}),
    )


ONESTEP_RECIPES: dict[str, Callable[..., OneStepConfig]] = {
    "tiny": onestep_tiny,
    "sd15": onestep_sd15,
    "sdxl": onestep_sdxl,
}
