"""The configuration of a trajectory distillation run (paper, Algorithm 1 and Sec. 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.measure import MeasureConfig
from hypersd_ray.config.run import OptimConfig, RunConfig, check_shares
from hypersd_ray.config.zero import ZeroConfig
from hypersd_ray.diffusion.segments import StartRule, TEndRule, check_grid
from hypersd_ray.losses.adversarial import AdversarialKind
from hypersd_ray.losses.schedule import LossWeights, loss_weights


class DistillConfig(Strict):
    """Algorithm 1's inputs. Progressive, consistency, CTM/TCD, segmented distillation and rectified flow are settings
    of these (`hypersd_ray/recipes/trajectory.py`)."""

    name: str = Field(default="tscd", pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """The method's: a stage's file is NAME-kK.safetensors. Jobs of one stage (jobs/onestep.py) name theirs otherwise."""
    k_list: tuple[int, ...] = (8, 4, 2, 1)
    """Segments of each stage. A stage of as many as the one before goes on with the same teacher: it is another phase
    of it."""
    n_list: tuple[int, ...] = (40, 40, 40, 40)
    """Solver steps N of each stage; a multiple of that stage's k."""
    steps_list: tuple[int, ...] = (5000, 5000, 5000, 5000)
    """Optimiser steps of each stage."""
    start: StartRule = "grid"
    """Where both sides set out: "grid" any solver time, "edges" the segments' upper edges (a student of k steps)."""
    pure_noise: bool = False
    """At T set out from noise alone, as samplers do, and not from the noised image (SDXL-Lightning, Sec. 3.5)."""
    t_end: TEndRule = "uniform"
    """Where both sides jump to: "uniform" in the segment (CTM, TSCD), "segment_start" (consistency distillation; with
    start="edges" progressive distillation), "two_steps" (progressive distillation over all grid times)."""
    target: Literal["ema", "student", "teacher"] = "ema"
    """Who goes on from the solver's first step: the EMA by one jump (Eq. 14), the student itself by one (LCM's
    scripts), or the teacher, step by step (Eq. 4)."""
    teacher: Literal["base", "previous"] = "base"
    """Who makes the solver's steps once k falls: the base with guidance, or the student of the k before, without."""
    path: Literal["ode", "straight"] = "ode"
    """"ode": the student jumps along the ODE; "straight": it flows along the straight lines between the ends of the k
    windows, asked at any time of them (PeRFlow); needs start="edges", t_end="segment_start", target="teacher"."""
    omega_min: float = Field(default=3.0, ge=1)
    """Least guidance scale of the teacher's step, as uncond + omega (cond - uncond)."""
    omega_max: float = Field(default=7.0, ge=1)
    """Greatest guidance scale."""
    empty_prompts: float = Field(default=0.0, ge=0, lt=1)
    """Share of the captions that are emptied. With omega_min = omega_max = 1 the student then keeps guidance: it learns
    the unguided teacher with and without a prompt, and is guided when it samples (CFG-preserving)."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """mu of Algorithm 1, line 16."""
    distance: Literal["mse", "huber"] = "mse"
    """The non-adversarial part of d in Eq. 14."""
    huber_c: float = Field(default=1e-3, gt=0)
    """Width of the pseudo-Huber distance's quadratic part."""
    perturbation: float = Field(default=0.1, ge=0)
    """Strength of the noise perturbation (offset noise, Sec. 3.1); 0 is off."""

    @property
    def keeps_guidance(self) -> bool:
        """No guidance is distilled into the student: it can be guided, and takes negative prompts."""
        return self.omega_max == 1 and self.empty_prompts > 0

    @model_validator(mode="after")
    def _stages_fit(self) -> DistillConfig:
        if not len(self.k_list) == len(self.n_list) == len(self.steps_list):
            raise CombinationError(
                f"distill: k_list, n_list and steps_list need one entry a stage, they have {len(self.k_list)}, {len(self.n_list)} and {len(self.steps_list)}"
            )
        if not self.k_list or min(self.steps_list) < 1:
            raise CombinationError(f"distill.steps_list={self.steps_list}: at least one stage of at least one step")
        if any(a < b for a, b in pairwise(self.k_list)):
            raise CombinationError(f"distill.k_list={self.k_list} must not rise from stage to stage")
        for k, n in zip(self.k_list, self.n_list, strict=True):
            try:
                check_grid(1000, n, k)
            except ValueError as error:
                raise CombinationError(f"distill.n_list={self.n_list}: {error}") from None
        if self.omega_max < self.omega_min:
            raise CombinationError(
                f"distill.omega_max={self.omega_max} is below distill.omega_min={self.omega_min}: lower one, or raise the other"
            )
        if self.t_end == "two_steps" and self.target != "teacher":
            raise CombinationError(
                f"distill.t_end='two_steps' with distill.target={self.target!r}: those are the teacher's steps; set target='teacher'"
            )
        return self

    @model_validator(mode="after")
    def _lines_fit(self) -> DistillConfig:
        if self.path == "straight":
            for field, value in {"start": "edges", "t_end": "segment_start", "target": "teacher"}.items():
                if getattr(self, field) != value:
                    raise CombinationError(
                        f"distill.path='straight' with distill.{field}={getattr(self, field)!r}: a line joins the ends of the teacher's "
                        f"way through a window; set {field}={value!r}"
                    )
        return self

    def taught_by_base(self, stage: int) -> bool:
        """Whether the base makes the solver's steps of `stage`, and not a student."""
        return self.teacher == "base" or self.k_list[stage] == self.k_list[0]

    def solver_steps(self, stage: int) -> int:
        """Most steps that the teacher makes to a target when it makes all of them."""
        n = self.n_list[stage] // self.k_list[stage]
        return min(n, {"previous": 1, "two_steps": 2}.get(self.t_end, n))


class AdversarialConfig(Strict):
    """The adversarial part of d in Eq. 14, rising over the stages while MSE falls."""

    kind: AdversarialKind = "hinge"
    """Loss of the discriminator and the student."""
    adv_start: float = Field(default=0.0, ge=0)
    """Weight of the adversarial loss in the first stage."""
    adv_end: float = Field(default=0.1, ge=0)
    """Weight in the last."""
    mse_start: float = Field(default=1.0, ge=0)
    """Weight of the distance in the first stage."""
    mse_end: float = Field(default=0.5, ge=0)
    """Weight in the last."""
    shape: float = Field(default=1.0, ge=0)
    """Above 1 the weights change late, below 1 early; 0 at once, after the first stage."""
    conditional: tuple[bool, ...] = (False,)
    """Per stage, or once for all: the discriminator sees the x_{t_n} that an end came from beside it, so that a student
    cannot give it the end of another trajectory (SDXL-Lightning's first phase; its second asks for good ends alone)."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the discriminator's heads."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of a stage, at its beginning, in which the adversarial loss is left out of the student's; the discriminator learns
    all the time."""

    def weights(self, stage: int, stages: int) -> LossWeights:
        """The stage's loss weights."""
        return loss_weights(
            stage,
            stages,
            mse_start=self.mse_start,
            mse_end=self.mse_end,
            adv_start=self.adv_start,
            adv_end=self.adv_end,
            shape=self.shape,
        )

    def is_conditional(self, stage: int) -> bool:
        """Whether the stage's discriminator sees where an end came from."""
        return self.conditional[stage if len(self.conditional) > 1 else 0]

    @model_validator(mode="after")
    def _monotone(self) -> AdversarialConfig:
        try:
            self.weights(0, 2)
        except ValueError as error:
            raise CombinationError(f"adversarial: {error}") from None
        return self


class LoRAConfig(Strict):
    """The student's adapter."""

    rank: int = Field(default=64, ge=1)
    """Rank r of each update."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank; None is alpha = rank."""

    @property
    def effective_alpha(self) -> float:
        """alpha, or the rank."""
        return float(self.rank) if self.alpha is None else self.alpha


class TSCDConfig(Strict):
    """A distillation run: teacher and shards in, one LoRA (or UNet) per stage out."""

    teacher: str
    """Folder of the base model in diffusers' layout."""
    data: DataConfig
    """Image-text shards and their encoding."""
    distill: DistillConfig = DistillConfig()
    """The method."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """The adversarial part of the loss."""
    lora: LoRAConfig = LoRAConfig()
    """The student's adapter."""
    full_unet: bool = False
    """Train a full copy of the UNet in place of a LoRA."""
    zero: ZeroConfig = ZeroConfig()
    """How the full UNet's training is shared out over the workers."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    run: RunConfig = RunConfig()
    """Where it runs."""
    first_stage: str | None = None
    """LoRA that the first stage of another such run left, a .safetensors file in either layout, any fsspec URL: this run
    begins with its second stage from there."""
    measure: MeasureConfig = MeasureConfig()
    """Quality that is measured at each stage's end, into the logs and quality.jsonl."""

    @model_validator(mode="after")
    def _first_stage_fits(self) -> TSCDConfig:
        if self.first_stage is not None and (self.stages < 2 or self.full_unet):
            raise CombinationError(
                f"first_stage={self.first_stage} with {self.stages} stages and full_unet={self.full_unet}: it stands for the "
                "first of several stages of a LoRA; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> TSCDConfig:
        check_shares(self.optim.batch, self.run, self.optim)
        if not Path(self.teacher).is_dir():
            raise CombinationError(
                f"teacher={self.teacher!r} is not a folder: name one in diffusers' layout (model_index.json, unet/, vae/, ...)"
            )
        if len(self.adversarial.conditional) not in (1, self.stages):
            raise CombinationError(
                f"adversarial.conditional has {len(self.adversarial.conditional)} entries, distill.k_list {self.stages} "
                "stages: give one entry a stage, or one for all"
            )
        if self.distill.path == "straight" and self.adversarial.adv_end > 0:
            raise CombinationError(
                f"adversarial.adv_end={self.adversarial.adv_end} with distill.path='straight': there the loss compares "
                "velocities, which no discriminator judges; set adversarial.adv_end=0"
            )
        return self

    @model_validator(mode="after")
    def _zero_has_something_to_share(self) -> TSCDConfig:
        if self.zero.stage and not self.full_unet:
            raise CombinationError(
                f"zero.stage={self.zero.stage} without full_unet: a LoRA's moments are small, it needs no ZeRO; "
                "leave zero.stage out or set full_unet"
            )
        return self

    @property
    def stages(self) -> int:
        """How many stages the run has."""
        return len(self.distill.k_list)

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Optimiser steps of each stage."""
        return self.distill.steps_list

    @property
    def stage_k(self) -> tuple[int | None, ...]:
        """Segments of each stage."""
        return self.distill.k_list

    @property
    def fewest_rows(self) -> int:
        """Rows that a micro-batch needs."""
        return 1

    def located(self, locate: Callable[[str], str]) -> Self:
        """The same with `locate` applied to each path that workers read."""
        update: dict[str, Any] = {"teacher": locate(self.teacher)}
        places = {name: locate(path) for name in ("clip", "cache") if (path := getattr(self.measure, name)) is not None}
        if places:
            update["measure"] = self.measure.model_copy(update=places)
        if self.first_stage is not None:
            update["first_stage"] = locate(self.first_stage)
        return self.model_copy(update=update)
