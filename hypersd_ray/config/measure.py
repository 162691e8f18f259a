"""What a run measures of itself at the end of each stage."""

from __future__ import annotations

from pydantic import Field, field_validator

from hypersd_ray.config.base import Strict


class MeasureConfig(Strict):
    """Quality at a stage's end: distance to where the teacher's own long trajectory ends, and CLIP score.

    Not the loss: the weights of its parts change what it means.
    """

    prompts: tuple[str, ...] = ()
    """What is sampled; x_T is a function of (seed, prompt). Without prompts nothing is measured."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Sampling steps."""
    guidance: float = Field(default=3.0, ge=1)
    """The teacher's guidance scale."""
    reference_steps: int = Field(default=50, ge=1, le=1000)
    """DDIM steps of the teacher's trajectory."""
    clip: str | None = None
    """CLIP that scores pictures against their prompts, a folder or file as in rewards.checkpoint; None leaves it out."""
    clip_weight: float = Field(default=1.0, ge=0)
    """How many percent of distance one percent of CLIP score is worth in the objective."""
    seed: int = 1
    """Of x_T."""
    batch: int = Field(default=64, ge=1)
    """Prompts sampled at a time."""
    cache: str | None = None
    """Folder where the teacher's end points are kept for other runs; None makes them anew in each process."""

    @field_validator("prompts")
    @classmethod
    def _enough(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value) or len(value) == 1:
            found = f"{len(set(value))} distinct of {len(value)}"
            raise ValueError(f"measure.prompts has {found}: none, or at least 2, each once")
        return value

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1 or max(value) > 1000:
            raise ValueError(f"measure.steps={value}: at least one, each within 1..1000")
        return value
