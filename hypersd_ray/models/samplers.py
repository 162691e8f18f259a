"""diffusers' schedulers, made so that a few-step student is sampled as it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

TCD_GRID = 40
"""`original_inference_steps` that puts TCDScheduler's and LCMScheduler's 1, 2, 4, 5 and 8 steps on the training edges (its default of 50
starts the last of 4 steps at 259 in place of 249, and at 8 steps jumps across an edge)."""
SCHEDULERS = {"tcd": TCDScheduler, "lcm": LCMScheduler, "ddim": DDIMScheduler}
"""What options call them -> diffusers' classes."""


def scheduler_options(sampler: str, timesteps: Sequence[int] = ()) -> dict[str, Any]:
    """What a scheduler of `SCHEDULERS` is told beside the base's noise schedule. `timesteps`: the network's inputs of a
    student that was made for those alone, which `set_timesteps` takes in place of the grid."""
    if sampler == "ddim":
        # Latents are not confined to [-1, 1]; released configs say so too, but DDIM's own default clips.
        return {"timestep_spacing": "trailing", "clip_sample": False}
    return {} if sampler == "lcm" and timesteps else {"original_inference_steps": TCD_GRID}


def diffusers_scheduler(sampler: str, base: str | Path | Mapping[str, Any], timesteps: Sequence[int] = ()) -> Any:
    """The scheduler on the noise schedule of `base`: a pipeline's folder, or the config of a scheduler on it."""
    kind = SCHEDULERS[sampler]
    if isinstance(base, str | Path):
        base = kind.load_config(base, subfolder="scheduler", local_files_only=True)
    return kind.from_config(base, **scheduler_options(sampler, timesteps))
