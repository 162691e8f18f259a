"""The configuration of score distillation: one-step enhancement (paper, Sec. 3.3 and 4.1), Turbo, DMD."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.rewards import PlacementConfig, RewardConfig
from hypersd_ray.config.run import RunConfig, check_shares, rows_each
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig, TSCDConfig

UNIFIED_TIMESTEP, DEDICATED_TIMESTEP = 999, 800
"""The network's input in the single step (its own index; our t is one more). Paper, Sec. 4.1."""
SHARE_IS_MET = 1.5
"""A micro-batch has whole rows: how many times more or less than the asked share its consistency rows may be."""


class DMDConfig(Strict):
    """Distribution matching (Eq. 10): a real score, a fake score, and the difference of the two as a gradient."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the distribution matching loss; 0 leaves the single step to regression, the discriminator or feedback."""
    guidance: float = Field(default=8.0, ge=1)
    """Guidance scale of the real score, as uncond + guidance (cond - uncond); DMD2: 1.75 (SD1.5), 8 (SDXL)."""
    low: float = Field(default=0.02, ge=0, le=1)
    """Generated latents are re-noised to t uniform on [low T, high T] before both scores judge them."""
    high: float = Field(default=0.98, ge=0, le=1)
    """See low."""
    fake_updates: int = Field(default=5, ge=0)
    """Updates of the fake score for each of the student; DMD2: 10 (SD1.5), 5 (SDXL). 0 is score distillation sampling:
    without a fake score, the gradient is that towards what the teacher sees."""
    measure: Literal["dmd", "add"] = "dmd"
    """"dmd": Eq. 10's difference over its own size; "add": alpha_t times the squared distance to what the teacher sees
    (Turbo's distillation loss), which has no fake score."""
    fake_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the fake score; None is optim.lr."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which only the fake score learns, before the student hears of it."""

    @model_validator(mode="after")
    def _range_rises(self) -> DMDConfig:
        if self.high <= self.low:
            raise CombinationError(f"dmd.high={self.high} is not above dmd.low={self.low}: raise dmd.high")
        if self.measure == "add" and self.fake_updates:
            raise CombinationError(
                f"dmd.fake_updates={self.fake_updates} with dmd.measure='add': no fake score is in it; set dmd.fake_updates=0"
            )
        return self


class RegressionConfig(Strict):
    """The single step against the end points of the teacher's ODE from the same noise (DMD's regression loss)."""

    pairs: str | None = None
    """Folder of pairs that jobs/pairs.py made with this teacher, any fsspec URL; None is off: the mean squared error
    that the paper has beside distribution matching (Sec. 3.3) is then left out."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error."""
    batch: int = Field(default=32, ge=1)
    """Pairs of one step over all workers."""


class RewardsConfig(Strict):
    """Feedback (Eq. 15) on the pictures of the single step, beside its other losses."""

    rewards: tuple[RewardConfig, ...] = ()
    """r_d of Eq. 15; none is off."""
    weight: float = Field(default=0.1, gt=0)
    """Weight of L_aes."""
    decode_batch: int = Field(default=4, ge=1)
    """Latents decoded at once; each is decoded again in the backward pass, to save memory."""
    placement: PlacementConfig = PlacementConfig()
    """Where the models run."""

    @model_validator(mode="after")
    def _fits(self) -> RewardsConfig:
        names = [r.name for r in self.rewards]
        if len(set(names)) != len(names):
            raise CombinationError(f"feedback.rewards name {max(names, key=names.count)} twice: each model once")
        if watched := next((r.name for r in self.rewards if r.role == "watch"), None):
            raise CombinationError(
                f'feedback.rewards: {watched} has role "watch", which jobs/feedback.py alone knows: leave it out'
            )
        return self


class OneStepConfig(TSCDConfig):
    """Score distillation. One-step enhancement of a distilled LoRA: the k = 1 stage goes on in a share of each batch,
    distribution matching trains the single step in the rest. Or a few-step model from the base (mode "few")."""

    init: str | None = None
    """The TSCD LoRA to start from, a .safetensors file in either layout, any fsspec URL; None starts from the base."""
    mode: Literal["unified", "dedicated", "few"] = "unified"
    """"unified": one LoRA for 1 to 8 steps, its single step at the network's input 999; "dedicated": a model for the
    single step alone, at 800, by distribution matching alone unless regression.pairs adds the paper's mean squared error
    (Sec. 3.3); "few": a model that jumps to clean data from each of `timesteps`, with new noise between (Turbo, DMD2)."""
    timestep: int | None = Field(default=None, ge=0, le=999)
    """The network's input in the single step; None is 999 (unified) or 800 (dedicated)."""
    timesteps: tuple[int, ...] = ()
    """mode "few": the network's inputs of its steps, falling; Turbo and DMD2: 999 749 499 249."""
    inputs: Literal["generated", "data"] = "generated"
    """mode "few": what is noised to the timesteps after the first: the student's own steps so far, as it will be in
    sampling (DMD2), or the data (Turbo)."""
    consistency_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of each batch in which consistency over all t goes on, so that 2 to 8 steps stay good; None is 0.25
    (unified) or 0 (dedicated, few)."""
    dmd: DMDConfig = DMDConfig()
    """Distribution matching."""
    regression: RegressionConfig = RegressionConfig()
    """The mean squared error for stability, beside or in place of consistency."""
    feedback: RewardsConfig = RewardsConfig()
    """What people like, beside them."""
    distill: DistillConfig = DistillConfig(k_list=(1,), n_list=(40,), steps_list=(5000,))
    """The consistency that goes on, at k = 1, and the length of the run. Its name is not used: files are named by the
    mode. No caption is emptied."""
    adversarial: AdversarialConfig = AdversarialConfig(adv_end=0.0, mse_end=1.0)
    """adv_end is the weight of an adversarial loss on the single step, against the data; mse_end that of consistency.
    There is one stage: what the weights start at, and in which shape they change, is nothing here."""
    run: RunConfig = RunConfig(name="onestep")
    """Where it runs."""

    @property
    def models(self) -> tuple[RewardConfig, ...]:
        """All reward models that must be loaded."""
        return self.feedback.rewards

    @property
    def placement(self) -> PlacementConfig:
        """Where they run."""
        return self.feedback.placement

    @property
    def t_input(self) -> int:
        """The single step's start in our time, 1..T; of several the first."""
        if self.mode == "few":
            return self.timesteps[0] + 1
        default = UNIFIED_TIMESTEP if self.mode == "unified" else DEDICATED_TIMESTEP
        return (default if self.timestep is None else self.timestep) + 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the student's jumps to clean data start, in our time."""
        return tuple(t + 1 for t in self.timesteps) if self.mode == "few" else (self.t_input,)

    @property
    def share(self) -> float:
        """Of consistency."""
        default = 0.25 if self.mode == "unified" else 0.0
        return default if self.consistency_share is None else self.consistency_share

    def consistency_rows(self, rows: int) -> int:
        """How many of a micro-batch's rows go on with consistency; at least one on each side where both are asked for."""
        return min(max(1, round(self.share * rows)), rows - 1) if self.share > 0 else 0

    @property
    def fewest_rows(self) -> int:
        """Rows that a micro-batch needs for its consistency rows to be `share` of it, but for a factor of SHARE_IS_MET."""
        if self.share == 0:
            return 1
        least, most = self.share / SHARE_IS_MET, self.share * SHARE_IS_MET
        return next(rows for rows in count(2) if least <= self.consistency_rows(rows) / rows <= most)

    def located(self, locate: Callable[[str], str]) -> Self:
        """The same with `locate` applied to each path that workers read."""
        moved = super().located(locate)
        if self.init is not None:
            moved = moved.model_copy(update={"init": locate(self.init)})
        if self.regression.pairs is not None:
            pairs = self.regression.model_copy(update={"pairs": locate(self.regression.pairs)})
            moved = moved.model_copy(update={"regression": pairs})
        rewards = tuple(reward.located(locate) for reward in self.feedback.rewards)
        return moved.model_copy(update={"feedback": self.feedback.model_copy(update={"rewards": rewards})})

    @model_validator(mode="after")
    def _one_stage(self) -> OneStepConfig:
        if self.distill.k_list != (1,):
            raise CombinationError(f"distill.k_list={self.distill.k_list}: one-step enhancement goes on at k = 1 alone")
        if self.mode == "few":
            self._check_few()
        elif self.timesteps:
            raise CombinationError(f"timesteps={self.timesteps} with mode={self.mode!r}: set mode='few', or timestep")
        if self.mode == "unified" and self.t_input != UNIFIED_TIMESTEP + 1:
            raise CombinationError(
                f"timestep={self.timestep} with mode='unified': samplers of 1 to 8 steps start at {UNIFIED_TIMESTEP}; "
                "leave timestep out or set mode='dedicated'"
            )
        if self.distill.teacher == "previous":
            raise CombinationError("distill.teacher='previous': one-step enhancement has one stage; use 'base'")
        if self.distill.empty_prompts > 0:
            raise CombinationError(
                f"distill.empty_prompts={self.distill.empty_prompts}: score distillation puts guidance into the student, which "
                "then keeps none; set distill.empty_prompts=0"
            )
        if self.init is not None and "://" not in self.init and not Path(self.init).is_file():
            raise CombinationError(
                f"init={self.init!r} is not a file: name the LoRA that jobs/tscd.py made (lora/tscd-k1.safetensors)"
            )
        return self

    def _check_few(self) -> None:
        falls = all(a > b for a, b in pairwise(self.timesteps))
        if not self.timesteps or not falls or self.timesteps[0] > 999 or self.timesteps[-1] < 0:
            raise CombinationError(
                f"timesteps={self.timesteps} with mode='few': name the network's inputs, falling within 999..0, "
                "for example 999 749 499 249"
            )
        if self.timestep is not None:
            raise CombinationError(f"timestep={self.timestep} with mode='few': timesteps={self.timesteps} says all")
        if self.regression.pairs is not None:
            raise CombinationError("regression.pairs with mode='few': pairs are single steps; set mode='dedicated'")

    def _check_one_weight(self) -> None:
        """No setting of weights that change over stages, of which there is one."""
        a, left_out = self.adversarial, AdversarialConfig()
        same = {
            "adv_start": (left_out.adv_start, a.adv_end),
            "mse_start": (left_out.mse_start, a.mse_end),
            "shape": (left_out.shape,),
        }
        for field, accepted in same.items():
            if (value := getattr(a, field)) not in accepted:
                raise CombinationError(
                    f"adversarial.{field}={value}: there is one stage, whose weights are adversarial.adv_end={a.adv_end} and "
                    f"adversarial.mse_end={a.mse_end}: set those, and leave {field} out"
                )

    @model_validator(mode="after")
    def _something_to_learn(self) -> OneStepConfig:
        if any(self.adversarial.conditional):
            raise CombinationError(
                "adversarial.conditional: here generated ends are judged against the data, which came from nowhere; "
                "leave it out"
            )
        self._check_one_weight()
        others = self.regression.pairs is not None or self.adversarial.adv_end > 0 or self.feedback.rewards
        if self.dmd.weight == 0 and not others:
            raise CombinationError(
                "dmd.weight=0 without regression.pairs, adversarial.adv_end or feedback.rewards: nothing trains the single "
                "step; set one"
            )
        if self.regression.pairs is not None:
            check_shares(self.regression.batch, self.run, self.optim, "regression.batch")
        rows = rows_each(self.optim.batch, self.run.workers, self.optim.accumulation) // self.optim.accumulation
        if rows < self.fewest_rows:
            raise CombinationError(
                f"optim.batch={self.optim.batch} leaves {rows} row{'s' * (rows > 1)} to a part, consistency_share={self.share} "
                f"needs at least {self.fewest_rows}: raise optim.batch, lower optim.accumulation={self.optim.accumulation} "
                f"or run.workers={self.run.workers}, or set another consistency_share"
            )
        return self
