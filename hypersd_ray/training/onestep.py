"""Score distillation: one-step enhancement (paper, Sec. 3.3), by distribution matching of the single step with
consistency over all t beside it; and few-step models, whose several steps are trained as the single one is.

Three networks on one base: the student (a TSCD LoRA to begin with), the teacher (the base with guidance: the real
score) and the fake score, which knows the distribution of the student's single steps by denoising them. A step updates
the fake score several times and the student once.

Shapes: x_T, x_t, x (B, C, h, w) noise, noised and generated latents; t (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import Times
from hypersd_ray.diffusion.solver import ddim_step
from hypersd_ray.losses.distances import mse
from hypersd_ray.losses.dmd import dmd_loss, fake_score_loss, renoising_times, score_distillation_loss
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import FAKE, STUDENT, TEACHER, Roles
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.learner import Learner, learner_of
from hypersd_ray.training.metrics import averaged
from hypersd_ray.training.progress import learning_rate
from hypersd_ray.training.protocol import Saved
from hypersd_ray.training.rewarded import Rewarded
from hypersd_ray.training.tscd import Batch, Pair, consistency_loss, make_pair


@dataclass(frozen=True)
class OdePairs:
    """x_T (B, C, h, w): noise; x0: where the teacher's ODE ends from there; cond: its prompt."""

    x_T: Tensor
    x0: Tensor
    cond: Conditioning

    def chunks(self, parts: int) -> list[OdePairs]:
        """`parts` equal micro-batches."""
        ends = Batch(self.x0, self.cond).chunks(parts)
        return [OdePairs(noise, end.x0, end.cond) for noise, end in zip(self.x_T.chunk(parts), ends, strict=True)]


def single_step(roles: Roles, role: str, x_T: Tensor, cond: Conditioning, t_input: int) -> Tensor:
    """x (B, C, h, w): one jump of `role` from noise, at the network's input `t_input` (our time), to t = 0.

    Where t_input is below T the noise stays pure: the network is told that it sees less of it than it does.
    """
    return to_clean(roles, role, x_T, torch.full((len(x_T),), t_input, device=x_T.device), cond)


def to_clean(roles: Roles, role: str, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """x (B, C, h, w): one jump of `role` from x_t at t to t = 0."""
    return ddim_step(roles.schedule, roles.denoiser(role, cond), x_t, t, torch.zeros_like(t))


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


class OneStep(Distiller):
    """A `Distiller` at k = 1 with a fake score and its optimiser beside the student's.

    Args:
        config: the run.
        roles: student and EMA on the base, the student already at the TSCD LoRA.
        null: the unconditional input of guidance, batch 1.
        rank: this worker's, for its randomness.
        rewarded: feedback on the single step's pictures; None is none.
    """

    config: OneStepConfig

    def __init__(
        self, config: OneStepConfig, roles: Roles, null: Conditioning, rank: int = 0, rewarded: Rewarded | None = None
    ):
        self.rewarded = rewarded
        roles.add(FAKE, trainable=True)  # the base: the teacher's own score, as DMD starts
        self.fake = learner_of(roles, FAKE, config.optim)
        super().__init__(config, roles, null, rank)

    @property
    def warming_up(self) -> bool:
        """The fake score still learns what the student does; the student is not told yet."""
        return self.progress.step < self.config.dmd.warmup_share * self.steps

    def _enter_stage(self) -> None:
        super()._enter_stage()
        self.fake.forget()

    def step(self, batch: Batch, pairs: OdePairs | None = None) -> dict[str, Tensor]:
        """Several updates of the fake score, one of the student, on this worker's share; returns detached scalars.

        An update whose gradient has a NaN or inf on any worker is left out and the step is counted in `progress`.
        """
        progress, parts = self.progress, self.config.optim.accumulation
        bad_before = progress.bad_in_a_row
        fake_metrics, fake_is_well = self._learn_fake(batch.chunks(parts))
        micros = zip(batch.chunks(parts), [None] * parts if pairs is None else pairs.chunks(parts), strict=True)
        totals = averaged(
            (self._learn_student(*micro, self._generator(index), parts) for index, micro in enumerate(micros)), parts
        )
        if self.student.pending or self._heads is not None:
            totals["grad_norm"] = self._update()
        else:  # the fake score alone learns
            progress.bad_in_a_row = 0
        if not fake_is_well and progress.bad_in_a_row == 0:
            progress.skipped, progress.bad_in_a_row = progress.skipped + 1, bad_before + 1
        progress.step += 1
        return totals | fake_metrics | self._counts()

    def _counts(self) -> dict[str, Tensor]:
        """Of the rewards: scores left out so far, and this step's seconds of waiting for them."""
        if self.rewarded is None:
            return {}
        client = self.rewarded.client
        dropped = {f"dropped/{name}": torch.tensor(float(n)) for name, n in client.dropped.items()}
        return dropped | {"reward_seconds": torch.tensor(client.take_seconds())}

    def _learn_fake(self, micros: list[Batch]) -> tuple[dict[str, Tensor], bool]:
        """`fake_updates` updates of the fake score, each on newly generated latents; (metrics, none had a NaN)."""
        c, well, loss = self.config, True, torch.zeros((), device=self.roles.device)
        if c.dmd.weight == 0 or c.dmd.fake_updates == 0:
            return {}, well
        for update in range(c.dmd.fake_updates):
            loss = torch.zeros_like(loss)
            for index, micro in enumerate(micros):
                generated = micro.rows(c.consistency_rows(len(micro.x0)), len(micro.x0))
                part = self._fake_loss(generated, self._generator(index, "fake", update))
                self.fake.backward(part / len(micros))
                loss += part.detach() / len(micros)
            well &= self._update_fake()
        return {"fake_score": loss}, well

    def _set_out(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_t and t of the student's jumps to clean data: noise, and where the model has more steps than one, each row
        at one of them, noised from the data or from what the student made of the step before."""
        starts, schedule = self.config.starts, self.roles.schedule
        x_t = _randn(batch.x0, generator)
        t = torch.full((len(x_t),), starts[0], device=x_t.device)
        if len(starts) == 1:
            return x_t, t
        chosen = torch.randint(len(starts), (len(x_t),), generator=generator).to(x_t.device)
        for index, start in enumerate(starts[1:], start=1):
            goes_on, then = chosen >= index, torch.full_like(t, start)
            clean = self._so_far(batch, x_t, t, goes_on) if self.config.inputs == "generated" else batch.x0
            noised = add_noise(schedule, clean, _randn(x_t, generator), then)
            x_t, t = torch.where(goes_on.view(-1, 1, 1, 1), noised, x_t), torch.where(goes_on, then, t)
        return x_t, t

    @torch.no_grad()
    def _so_far(self, batch: Batch, x_t: Tensor, t: Tensor, goes_on: Tensor) -> Tensor:
        """What the student makes of x_t in the rows that go on; the others stay as they are, and are not asked for."""
        # One row where none goes on: all workers call the network equally often, as sharded weights need.
        index = (
            goes_on.nonzero().flatten() if bool(goes_on.any()) else torch.zeros(1, dtype=torch.long, device=t.device)
        )
        x = to_clean(self.roles, STUDENT, x_t[index], t[index], batch.cond.rows(index))
        return x_t.index_copy(0, index, x.to(x_t))

    def _fake_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Denoising of the student's steps to clean data, over all t, without guidance: a scalar."""
        with torch.no_grad():
            x = to_clean(self.roles, STUDENT, *self._set_out(batch, generator), batch.cond)
        eps = _randn(x, generator)
        t = renoising_times(len(x), self.roles.schedule.T, 0, 1, generator, x.device)
        seen = self.roles.predict(FAKE, add_noise(self.roles.schedule, x, eps, t), t, batch.cond)
        return fake_score_loss(seen.eps, eps).mean()

    def _update_fake(self) -> bool:
        """Average, clip, step; False when a NaN stopped it."""
        c = self.config
        optim = c.optim.model_copy(update={"lr": c.dmd.fake_lr or c.optim.lr})
        return bool(torch.isfinite(self.fake.step(learning_rate(optim, self.progress.step, self.steps))))

    def _learn_student(
        self, micro: Batch, pairs: OdePairs | None, generator: torch.Generator, parts: int
    ) -> dict[str, Tensor]:
        """Accumulate the student's (and the discriminator's) gradients of one micro-batch.

        Each loss goes backward by itself: one graph in memory at a time, and one call of the network for DeepSpeed.
        """
        c, split = self.config, self.config.consistency_rows(len(micro.x0))
        metrics: dict[str, Tensor] = {}
        if split:
            pair = make_pair(self.roles, micro.rows(0, split), self.null, c.distill, self.progress.stage, generator)
            metrics["consistency"] = consistency_loss(pair, self.measure)
            self._learn(self.weights.mse * metrics["consistency"], metrics, parts)
        if pairs is not None:
            x = single_step(self.roles, STUDENT, pairs.x_T, pairs.cond, c.t_input)
            metrics["regression"] = mse(x, pairs.x0).mean()
            self._learn(c.regression.weight * metrics["regression"], metrics, parts)
        self._learn_single_step(micro.rows(split, len(micro.x0)), metrics, generator, parts)
        return {name: value.detach() for name, value in metrics.items()}

    def _learn(self, loss: Tensor, metrics: dict[str, Tensor], parts: int) -> None:
        """One loss of the student backward; it counts in metrics["loss"]."""
        self.student.backward(loss / parts)
        metrics["loss"] = metrics.get("loss", 0) + loss.detach()

    def _learn_single_step(
        self, batch: Batch, metrics: dict[str, Tensor], generator: torch.Generator, parts: int
    ) -> None:
        """The losses of newly generated latents backward, the discriminator's too; metrics are added."""
        c = self.config
        told = c.dmd.weight > 0 and not self.warming_up
        judged = self.rewarded is not None and not self.warming_up  # the fake score learns what stands still till then
        if not told and not judged and self.adversary is None:
            return
        x_t, t = self._set_out(batch, generator)
        x = to_clean(self.roles, STUDENT, x_t, t, batch.cond)
        losses = []
        if told:
            metrics["dmd"] = self.matching_loss(x, batch.cond, generator)
            losses.append(c.dmd.weight * metrics["dmd"])
        if self.rewarded is not None and judged:
            aes, found = self.rewarded(x, batch.captions)
            losses.append(c.feedback.weight * aes)
            metrics |= found
        if self.adversary is not None:
            # Judged at all noise levels, whichever step an end is of.
            first, zero = torch.full_like(t, c.t_input), torch.zeros_like(t)
            pair = Pair(x, batch.x0, Times(first, zero, zero, zero), x_t)  # against the data: Eq. 8, 9
            adversarial, found = self._judge(self.adversary, pair, batch.cond, generator, parts)
            losses += [] if adversarial is None else [adversarial]
            metrics |= found
        if losses:
            self._learn(torch.stack(losses).sum(), metrics, parts)

    # Eq. 10
    def matching_loss(self, x: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        """Distribution matching (or Turbo's distance) of generated latents x (B, C, h, w), with gradient in x: a scalar."""
        c, T = self.config.dmd, self.roles.schedule.T
        t = renoising_times(len(x), T, c.low, c.high, generator, x.device)
        with torch.no_grad():
            x_t = add_noise(self.roles.schedule, x, _randn(x, generator), t)
            if c.guidance == 1:
                real = self.roles.predict(TEACHER, x_t, t, cond).x0
            else:
                omega = torch.full((len(x),), c.guidance, device=x.device)
                real = self.roles.guided(TEACHER, cond, self.null, omega)(x_t, t).x0
            # Without a fake score its mean is x itself: score distillation sampling.
            fake = self.roles.predict(FAKE, x_t, t, cond).x0 if c.fake_updates else x.detach()
        if c.measure == "add":
            return score_distillation_loss(x, real, self.roles.schedule.at(t)[0]).mean()
        return dmd_loss(x, real, fake).mean()

    def _role_names(self) -> list[str]:
        return [*super()._role_names(), FAKE]

    def _learners(self) -> dict[str, Learner]:
        return super()._learners() | {FAKE: self.fake}

    def notes(self) -> dict[str, Any]:
        """The progress, and what was counted so far."""
        return super().notes() | ({} if self.rewarded is None else {"dropped": dict(self.rewarded.client.dropped)})

    def load(self, saved: Saved, notes: dict[str, Any]) -> None:
        """Bring back what `parts` and `notes` gave.

        Raises:
            ValueError: they are of another configuration.
        """
        try:
            saved(FAKE)
        except LookupError:
            raise ValueError(
                "the checkpoint holds no fake score, it is of another kind of run: set run.name to start another"
            ) from None
        super().load(saved, notes)
        if self.rewarded is not None:
            self.rewarded.client.dropped = dict(notes.get("dropped", {}))
