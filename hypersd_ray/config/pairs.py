"""The configuration of pairs for regression: noise, and where the teacher's ODE ends from there."""

from __future__ import annotations

from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.data import DataConfig


class OdePairsConfig(Strict):
    """Which captions, which teacher, how its ODE is solved, and where the end points go."""

    teacher: str
    """Folder of the teacher in diffusers' layout."""
    out: str
    """Folder for the pairs, any fsspec URL."""
    data: DataConfig
    """The captions: image-text shards (encoded first, beside the pairs), or precomputed latents. data.encoder's actors
    encode, and solve the ODE: by default one on a CPU; on GPUs set encoder.num_gpus, and max_size to how many."""
    steps: int = Field(default=50, ge=1, le=1000)
    """DDIM steps of the ODE."""
    omega: float = Field(default=3.0, ge=1)
    """Guidance scale, as uncond + omega (cond - uncond)."""
    seed: int = 0
    """The noise is a function of it and of each row's key."""
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """Number type of the teacher: fp32 or bf16."""
