"""The configuration of ZeRO: how a full UNet's training is shared out over the workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict


class ZeroConfig(Strict):
    """DeepSpeed ZeRO. Each stage shares out more of what training holds, and talks more to get at it."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: every worker holds all. 1: each holds its share of the optimiser's moments, the float32 weights and the EMA;
    2: of the gradients too; 3: of the weights too."""
    offload: bool = False
    """Keep a worker's share of moments, float32 weights and EMA in the CPU's memory, and compute the optimiser's step
    there: slower, for little memory on the GPU."""
    teacher: bool = False
    """Share out the frozen teacher too; needs stage 3, else every worker has it whole."""
    bucket: int = Field(default=200_000_000, ge=1)
    """Numbers that are reduced or gathered at a time: fewer take less memory and more messages."""
    native: bool = True
    """Beside the checkpoint that any number of workers reads, save DeepSpeed's own: each worker reads back its share
    alone, where their number and the stage are the same. Twice the space."""

    @model_validator(mode="after")
    def _stage_fits(self) -> ZeroConfig:
        if self.stage == 0 and self.offload:
            raise CombinationError("zero.offload needs zero.stage=1, 2 or 3 (zero.stage=0 is off)")
        if self.stage < 3 and self.teacher:
            raise CombinationError(
                f"zero.teacher needs zero.stage=3, it is {self.stage}: only there weights are shared"
            )
        return self
