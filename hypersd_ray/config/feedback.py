"""The configuration of feedback learning (paper, Sec. 3.2): a LoRA on top of a TSCD LoRA, taught by rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.measure import MeasureConfig
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig
from hypersd_ray.config.run import OptimConfig, RunConfig, check_shares
from hypersd_ray.config.tscd import LoRAConfig
from hypersd_ray.diffusion.segments import edges


class ReFLConfig(Strict):
    """Eq. 15: where in the few-step trajectory the gradient is taken."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of L_aes in Eq. 17; 0 leaves the rewards out."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Sampler lengths; each micro-batch draws one, so that one LoRA serves them all."""
    t_left: int = Field(default=1, ge=1, le=1000)
    """Earliest time of the step with gradient."""
    t_right: int = Field(default=1000, ge=1, le=1000)
    """Latest time of it; a sampler so short that its last step begins earlier takes that one."""

    def candidates(self, steps: int) -> list[int]:
        """Indices of the sampler's steps whose time lies in [t_left, t_right], of T = 1000."""
        times = edges(1000, steps)[::-1][:-1]
        within = [i for i, t in enumerate(times) if self.t_left <= t <= self.t_right]
        return within or ([steps - 1] if times[-1] > self.t_right else [])

    @model_validator(mode="after")
    def _some_step(self) -> ReFLConfig:
        for steps in self.steps:
            if not 1 <= steps <= 1000:
                raise CombinationError(f"refl.steps={self.steps}: each must be within 1..1000")
            if not self.candidates(steps):
                raise CombinationError(
                    f"refl.t_left={self.t_left}, refl.t_right={self.t_right}: a sampler of {steps} steps has none there "
                    f"(its times are {edges(1000, steps)[:0:-1]}); widen them or change refl.steps={self.steps}"
                )
        if not self.steps:
            raise CombinationError("refl.steps is empty: name at least one sampler length, e.g. 1 2 4")
        return self


class StructureConfig(Strict):
    """Eq. 16: instance loss of a noised and denoised real picture."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of L_percep in Eq. 17; 0 leaves the structure out."""
    model: PerceptionConfig = PerceptionConfig()
    """m_I."""
    annotations: str = ""
    """COCO instances json. A picture is found in it by its key in the shards, which is the file name there without
    suffix: 000000391895 in a tar of 000000391895.jpg (of a folder before it nothing is asked), or a parquet's column
    key, __key__, id or SAMPLE_ID. One that is not in it, or all of them without a file, is judged against the model's
    own prediction on the real picture; the metric `annotated` is the share that is in it, and a run that finds none
    ends."""
    start: int = Field(default=500, ge=1, le=1000)
    """t to which the real latent is noised (Eq. 1)."""
    denoise_to: int = Field(default=250, ge=1, le=1000)
    """d_t: the time at which x'_0 is predicted, with gradient."""
    jumps: int = Field(default=1, ge=0)
    """Steps without gradient from start to denoise_to."""

    def times(self) -> list[int]:
        """start, ..., denoise_to."""
        if self.start == self.denoise_to:
            return [self.start]
        span = self.start - self.denoise_to
        return [self.start - round(i * span / self.jumps) for i in range(self.jumps + 1)]

    @model_validator(mode="after")
    def _falls(self) -> StructureConfig:
        if self.denoise_to > self.start:
            raise CombinationError(
                f"structure.denoise_to={self.denoise_to} is above structure.start={self.start}: lower it"
            )
        if self.start > self.denoise_to and not 1 <= self.jumps <= self.start - self.denoise_to:
            raise CombinationError(
                f"structure.jumps={self.jumps} must be within 1..{self.start - self.denoise_to} to get from "
                f"structure.start={self.start} to structure.denoise_to={self.denoise_to}"
            )
        return self


class WatchConfig(Strict):
    """Reward hacking: the trained scores beside held-out ones."""

    every: int = Field(default=20, ge=1)
    """Steps between measurements of the held-out rewards (no gradient), of all pictures of the step."""
    patience: int = Field(default=5, ge=1)
    """Measurements in a row with a trained reward rising and every held-out one falling before a warning."""
    smoothing: float = Field(default=0.7, ge=0, lt=1)
    """Of the running means that are compared, each with its own at the same number of steps."""


class FeedbackConfig(Strict):
    """A feedback run: base model, TSCD LoRA, rewards and prompts in; a feedback LoRA and its merge out."""

    teacher: str
    """Folder of the base model in diffusers' layout."""
    tscd: str
    """The TSCD LoRA (either layout) that the run starts from and stays near."""
    data: DataConfig
    """Shards with pictures and captions: prompts of Eq. 15, real pictures of Eq. 16."""
    steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""
    rewards: tuple[RewardConfig, ...]
    """r_d of Eq. 15, and held-out ones (role "watch")."""
    refl: ReFLConfig = ReFLConfig()
    """Human preference."""
    structure: StructureConfig = StructureConfig()
    """Perception."""
    drift: float = Field(default=1.0, ge=0)
    """Weight of the squared distance of x'_0 to the TSCD model's, once beside the rewards and once beside the structure
    loss, each on its own pictures; 0 lets the model leave its domain."""
    placement: PlacementConfig = PlacementConfig()
    """Where the models run."""
    watch: WatchConfig = WatchConfig()
    """Reward hacking."""
    decode_batch: int = Field(default=4, ge=1)
    """Latents decoded at once; each is decoded again in the backward pass, to save memory."""
    lora: LoRAConfig = LoRAConfig()
    """The feedback LoRA."""
    merge_weight: float = 1.0
    """How much of the feedback LoRA is in the merged one."""
    optim: OptimConfig = OptimConfig(lr=1e-5, batch=64)
    """The optimiser."""
    run: RunConfig = RunConfig(name="feedback")
    """Where it runs."""

    @property
    def measure(self) -> MeasureConfig:
        """Nothing is measured at the end: what it learns from and what it does not are logged all along."""
        return MeasureConfig()

    @property
    def trained(self) -> tuple[RewardConfig, ...]:
        """Rewards in the loss."""
        return tuple(r for r in self.rewards if r.role == "train")

    @property
    def watched(self) -> tuple[RewardConfig, ...]:
        """Held-out rewards."""
        return tuple(r for r in self.rewards if r.role == "watch")

    @property
    def models(self) -> tuple[RewardConfig | PerceptionConfig, ...]:
        """All that must be loaded."""
        return (*self.rewards, *((self.structure.model,) if self.structure.weight else ()))

    @property
    def stages(self) -> int:
        """There is one stage."""
        return 1

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """All in one stage."""
        return (self.steps,)

    @property
    def stage_k(self) -> tuple[int | None, ...]:
        """No segments."""
        return (None,)

    def located(self, locate: Callable[[str], str]) -> Self:
        """The same with `locate` applied to each path that workers or actors read."""

        def moved(model: Any, *fields: str) -> Any:
            values = {name: getattr(model, name) for name in fields}
            return model.model_copy(update={name: locate(value) for name, value in values.items() if value})

        structure = moved(self.structure, "annotations")
        updates = {
            "rewards": tuple(reward.located(locate) for reward in self.rewards),
            "structure": structure.model_copy(update={"model": moved(structure.model, "checkpoint")}),
        }
        return moved(self, "teacher", "tscd").model_copy(update=updates)

    @model_validator(mode="after")
    def _fits(self) -> FeedbackConfig:
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise CombinationError(f"rewards name {max(names, key=names.count)} twice: each model once")
        if self.refl.weight and not self.trained:
            raise CombinationError(
                'no reward has role "train": add one, or set refl.weight=0 to learn from structure only'
            )
        if not self.refl.weight and not self.structure.weight:
            raise CombinationError("refl.weight=0 and structure.weight=0 leave nothing to learn: raise one")
        if self.structure.weight and not self.structure.model.checkpoint:
            raise CombinationError(
                "structure.model.checkpoint is empty: name SOLO's weights, or set structure.weight=0"
            )
        check_shares(self.optim.batch, self.run, self.optim)
        for field, path in (("teacher", self.teacher), ("tscd", self.tscd)):
            if "://" not in path and not Path(path).exists():
                raise CombinationError(f"{field}={path!r} does not exist")
        return self
