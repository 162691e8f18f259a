"""The configuration of a sweep: many runs of one recipe that differ in a few numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.tscd import TSCDConfig

Range = tuple[float, float]


class SpaceConfig(Strict):
    """What is varied, each between two numbers; two equal ones hold it still.

    The weights of Eq. 14's parts stay monotone over the stages whatever is drawn: only the ratio of the two matters to the
    optimiser, so the MSE weight starts at 1, ends at `mse_end` <= 1, and the adversarial one starts at a share of its end.
    """

    adv_end: Range = (0.0, 0.2)
    """Adversarial weight of the last stage, uniform; 0 is off."""
    adv_start_share: Range = (0.0, 1.0)
    """That of the first stage as a share of it, uniform."""
    mse_end: Range = (0.2, 1.0)
    """MSE weight of the last stage, that of the first being 1, uniform."""
    shape: Range = (0.25, 4.0)
    """adversarial.shape, uniform in its logarithm: above 1 the weights change late."""
    lr: Range = (0.3, 3.0)
    """Factor of the base's learning rate, uniform in its logarithm."""
    omega_centre: Range = (0.8, 1.25)
    """Factor of the middle of the base's guidance range, uniform in its logarithm."""
    omega_width: Range = (0.0, 1.5)
    """Factor of its width, uniform."""
    ema_gap: Range = (0.3, 3.0)
    """Factor of 1 - ema_decay, uniform in its logarithm."""

    @model_validator(mode="after")
    def _in_order(self) -> SpaceConfig:
        limits = {"mse_end": (0.0, 1.0), "adv_start_share": (0.0, 1.0)}
        for name in type(self).model_fields:
            low, high = getattr(self, name)
            least, most = limits.get(name, (0.0, float("inf")))
            if not least <= low <= high <= most or (name in LOGARITHMIC and low <= 0):
                above = "above 0" if name in LOGARITHMIC else f"within {least:g}..{most:g}"
                raise CombinationError(f"space.{name}={low:g} {high:g}: two numbers {above}, the lower one first")
        return self


LOGARITHMIC = frozenset({"shape", "lr", "omega_centre", "ema_gap"})
"""Drawn uniformly in their logarithm."""


class SweepConfig(Strict):
    """Trials of a base recipe; the best one's configuration is what comes out."""

    base: TSCDConfig
    """The run that is varied. It is trained first, to its end: it is what trials are compared with, and its first stage is
    where they begin. base.measure says how quality is measured."""
    space: SpaceConfig = SpaceConfig()
    """What is varied."""
    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9._-]+$")
    """Folder under base.run.out; the same name goes on with the same sweep."""
    trials: int = Field(default=16, ge=1)
    """Runs beside the base's."""
    search: Literal["random", "optuna"] = "random"
    """Who chooses the numbers: chance, or Optuna's TPE by the trials before."""
    scheduler: Literal["asha", "none"] = "asha"
    """"asha": after a stage only the better half of the trials goes on; "none": all do."""
    reduction: float = Field(default=2.0, gt=1)
    """asha: one in how many goes on."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; None is as many as the cluster's CPUs and GPUs hold with all their workers and readers."""
    warm_start: bool = True
    """Trials begin with their second stage, from the base's first."""
    seed: int = 0
    """Of what is drawn."""
    confirm: tuple[str, ...] = ()
    """Other prompts, on which the best is compared with the base once more: on those that it was chosen by it looks better
    than it is."""

    @field_validator("confirm")
    @classmethod
    def _confirm_enough(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) == 1 or len(set(value)) != len(value):
            raise ValueError(
                f"confirm has {len(set(value))} distinct of {len(value)} prompts: none, or at least 2, each once"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        if not self.base.measure.prompts:
            raise CombinationError(
                "base.measure.prompts is empty: a sweep chooses by measured quality; give at least 2"
            )
        if self.base.full_unet or type(self.base) is not TSCDConfig:
            raise CombinationError("base.full_unet=True: a sweep is over LoRA runs; set base.full_unet=False")
        if self.warm_start and self.base.stages < 2:
            raise CombinationError("warm_start with one stage in base.distill.k_list: set warm_start=False")
        if self.base.distill.path == "straight" and self.space.adv_end[1] > 0:
            raise CombinationError("base.distill.path='straight' has no adversarial loss: set space.adv_end to 0 0")
        if overlap := set(self.confirm) & set(self.base.measure.prompts):
            raise CombinationError(
                f"confirm and base.measure.prompts share {len(overlap)} prompts: confirm takes others"
            )
        return self
