"""Recipes of sweeps: a base recipe and the prompts that quality is measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.measure import MeasureConfig
from hypersd_ray.config.sweep import SpaceConfig, SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes import tscd
from hypersd_ray.recipes.trajectory import Trajectory

CHOOSE, CONFIRM = 96, 256
"""Prompts to choose by, and other prompts to compare the best with the base."""


def _over(base: TSCDConfig, name: str, prompts: list[str], clip: str | None, guidance: float) -> SweepConfig:
    if len(prompts) < 4:
        raise ConfigError(f"{len(prompts)} distinct prompts to measure quality on: at least 4, better some hundred")
    choose = min(CHOOSE, len(prompts) // 2)
    measure = MeasureConfig(prompts=tuple(prompts[:choose]), clip=clip, guidance=guidance)
    # Heads that begin anew need more than the paper's rate where all else learns faster.
    adversarial = base.adversarial.model_copy(update={"lr": 1e-3} if base.optim.lr > 1e-4 else {})
    straight = base.distill.path == "straight"
    return SweepConfig(
        base=base.model_copy(update={"measure": measure, "adversarial": adversarial}),
        space=SpaceConfig(adv_end=(0.0, 0.0)) if straight else SpaceConfig(),
        name=name,
        warm_start=base.stages > 1,
        confirm=tuple(prompts[choose : choose + CONFIRM]),
    )


def tiny(budget: Literal["minutes", "full"] = "minutes", method: Trajectory = "tscd") -> SweepConfig:
    """The embedded model on a CPU; the recipe itself has the adversarial loss off, the sweep turns it on from weight 0."""
    captions = json.loads((paths.DATA / "captions_val.json").read_text())["annotations"]
    prompts = list(dict.fromkeys(row["caption"] for row in captions))
    base = tscd.tiny(budget, method)
    base = base.model_copy(update={"run": base.run.model_copy(update={"name": f"{base.run.name}-base"})})
    return _over(base, f"sweep-tiny-{budget}", prompts, str(paths.EVALUATORS / "clip"), guidance=3.0)


def _lines(prompts: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(prompts).read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"--prompts {prompts} cannot be read: {error.strerror}") from None
    return list(dict.fromkeys(line for line in lines if line))


def sd15(teacher: str, prompts: str, shards: str = "data/*.tar", clip: str = "") -> SweepConfig:
    """Stable Diffusion 1.5; `prompts` is a text file, one a line, `clip` open_clip's ViT-B-32 of OpenAI or nothing."""
    return _over(tscd.sd15(teacher, shards), "sweep-sd15", _lines(prompts), clip or None, guidance=5.5)


def sdxl(teacher: str, prompts: str, shards: str = "data/*.tar", clip: str = "") -> SweepConfig:
    """SDXL; see sd15."""
    return _over(tscd.sdxl(teacher, shards), "sweep-sdxl", _lines(prompts), clip or None, guidance=6.5)


SWEEP_RECIPES: dict[str, Callable[..., SweepConfig]] = {"tiny": tiny, "sd15": sd15, "sdxl": sdxl}
