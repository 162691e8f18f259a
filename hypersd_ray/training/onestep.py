"""Score distillation: one-step enhancement (paper, Sec. 3.3), by distribution matching of the single step with
consistency over all t beside it; and few-step models, whose several steps are trained as the single one is.

Three networks on one base: the student (a TSCD LoRA to begin with), the teacher (the base with guidance: the real
score) and the fake score, which knows the distribution of the student's single steps by denoising them. A step updates
the fake score several times and the student once.

Shapes: x_T, x_t, x (B, C, h, w) noise, noised and generated latents; t (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

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
from hypersd_ray.training.adversarial import adversarial_losses
from hypersd_ray.training.distiller import Distiller, learning_rate
from hypersd_ray.training.distributed import average_gradients
from hypersd_ray.training.randomness import generator_of
from hypersd_ray.training.tscd import Batch, Pair, consistency_loss, make_pair


@dataclass(frozen=True)
class Pairs:
    """x_T (B, C, h, w): noise; x0: where the teacher's ODE ends from there; cond: its prompt."""

    x_T: Tensor
    x0: Tensor
    cond: Conditioning

    def chunks(self, parts: int) -> list[Pairs]:
        """`parts` equal micro-batches."""
        ends = Batch(self.x0, self.cond).chunks(parts)
        return [Pairs(noise, end.x0, end.cond) for noise, end in zip(self.x_T.chunk(parts), ends, strict=True)]


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop-1."""
    return Batch(batch.x0[start:stop], batch.cond._map(lambda part: part[start:stop]))


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
    """

    config: OneStepConfig

    def __init__(self, config: OneStepConfig, roles: Roles, null: Conditioning, rank: int = 0):
        roles.add(FAKE)  # the base: the teacher's own score, as DMD starts
        self.fake = [p.requires_grad_(True) for p in roles.named_tensors(FAKE).values()]
        super().__init__(config, roles, null, rank)

    @property
    def warming_up(self) -> bool:
        """The fake score still learns what the student does; the student is not told yet."""
        return self.progress.step < self.config.dmd.warmup_share * self.steps

    def _new_optimizers(self) -> None:
        super()._new_optimizers()
        c = self.config.optim
        self.fake_lr = self.config.dmd.fake_lr or c.lr
        self.fake_optimizer = torch.optim.AdamW(
            self.fake, lr=self.fake_lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True
        )

    def step(self, batch: Batch, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """Several updates of the fake score, one of the student, on this worker's share; returns detached scalars.

        An update whose gradient has a NaN or inf on any worker is left out and the step is counted in `progress`.
        """
        progress, parts = self.progress, self.config.optim.accumulation
        bad_before = progress.bad_in_a_row
        fake_metrics, fake_is_well = self._learn_fake(batch.chunks(parts))
        totals: dict[str, Tensor] = {}
        both = zip(batch.chunks(parts), [None] * parts if pairs is None else pairs.chunks(parts), strict=True)
        for index, (micro, micro_pairs) in enumerate(both):
            generator = generator_of(self.config.run.seed, self.rank, progress.stage, progress.step, index)
            for name, value in self._learn_student(micro, micro_pairs, generator, parts).items():
                totals[name] = totals.get(name, 0) + value / parts
        learning = self.roles.trainable() + (
            [] if self.discriminator is None else list(self.discriminator.parameters())
        )
        if any(p.grad is not None for p in learning):
            for p in learning:  # a warm-up of one of the two leaves the other without
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            totals["grad_norm"] = self._update()
        if not fake_is_well and progress.bad_in_a_row == 0:
            progress.skipped, progress.bad_in_a_row = progress.skipped + 1, bad_before + 1
        progress.step += 1
        return totals | fake_metrics

    def _learn_fake(self, micros: list[Batch]) -> tuple[dict[str, Tensor], bool]:
        """`fake_updates` updates of the fake score, each on newly generated latents; (metrics, none had a NaN)."""
        c, progress = self.config, self.progress
        well, loss = True, torch.zeros((), device=self.roles.device)
        if c.dmd.weight == 0 or c.dmd.fake_updates == 0:
            return {}, well
        for update in range(c.dmd.fake_updates):
            loss = torch.zeros_like(loss)
            for index, micro in enumerate(micros):
                generator = generator_of(c.run.seed, self.rank, progress.stage, progress.step, index, "fake", update)
                part = self._fake_loss(rows(micro, c.consistency_rows(len(micro.x0)), len(micro.x0)), generator)
                (part / len(micros)).backward()
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
            clean = batch.x0
            if self.config.inputs == "generated":
                with torch.no_grad():
                    clean = to_clean(self.roles, STUDENT, x_t, t, batch.cond)
            goes_on, then = chosen >= index, torch.full_like(t, start)
            noised = add_noise(schedule, clean, _randn(x_t, generator), then)
            x_t, t = torch.where(goes_on.view(-1, 1, 1, 1), noised, x_t), torch.where(goes_on, then, t)
        return x_t, t

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
        average_gradients(self.fake)
        norm = torch.nn.utils.clip_grad_norm_(self.fake, self.config.optim.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            optim = self.config.optim.model_copy(update={"lr": self.fake_lr})
            for group in self.fake_optimizer.param_groups:
                group["lr"] = learning_rate(optim, self.progress.step, self.steps)
            self.fake_optimizer.step()
        self.fake_optimizer.zero_grad()
        return finite

    def _learn_student(
        self, micro: Batch, pairs: Pairs | None, generator: torch.Generator, parts: int
    ) -> dict[str, Tensor]:
        """Accumulate the student's (and the discriminator's) gradients of one micro-batch."""
        c, split = self.config, self.config.consistency_rows(len(micro.x0))
        metrics, losses = {}, []
        if split:
            pair = make_pair(self.roles, rows(micro, 0, split), self.null, c.distill, self.progress.stage, generator)
            metrics["consistency"] = consistency_loss(pair, self.measure)
            losses.append(self.weights.mse * metrics["consistency"])
        if pairs is not None:
            x = single_step(self.roles, STUDENT, pairs.x_T, pairs.cond, c.t_input)
            metrics["regression"] = mse(x, pairs.x0).mean()
            losses.append(c.regression.weight * metrics["regression"])
        more, matching = self._single_step_losses(rows(micro, split, len(micro.x0)), generator, parts)
        losses += more
        if losses:
            metrics["loss"] = torch.stack(losses).sum()
            (metrics["loss"] / parts).backward()
        return {name: value.detach() for name, value in (metrics | matching).items()}

    def _single_step_losses(
        self, batch: Batch, generator: torch.Generator, parts: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Weighted losses of newly generated latents, and metrics. The discriminator's gradients are accumulated here."""
        c = self.config
        told = c.dmd.weight > 0 and not self.warming_up
        if not told and self.discriminator is None:
            return [], {}
        x_t, t = self._set_out(batch, generator)
        x = to_clean(self.roles, STUDENT, x_t, t, batch.cond)
        losses, metrics = [], {}
        if told:
            metrics["dmd"] = self.matching_loss(x, batch.cond, generator)
            losses.append(c.dmd.weight * metrics["dmd"])
        if self.discriminator is not None:
            # Judged at all noise levels, whichever step an end is of.
            first, zero = torch.full_like(t, c.t_input), torch.zeros_like(t)
            pair = Pair(x, batch.x0, Times(first, zero, zero, zero), x_t)  # against the data: Eq. 8, 9
            student, heads = adversarial_losses(
                self.roles, self.discriminator, pair, batch.cond, c.adversarial.kind, generator
            )
            if self.progress.step >= c.adversarial.warmup_share * self.steps:
                losses.append(self.weights.adversarial * student)
            (heads / parts).backward()
            metrics |= {"adversarial": student, "discriminator": heads}
        return losses, metrics

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

    def optimizer_state(self) -> dict:
        """All optimisers' moments and the progress."""
        return super().optimizer_state() | {"fake": self.fake_optimizer.state_dict()}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Bring back what `tensors` and `optimizer_state` gave.

        Raises:
            ValueError: they are of another configuration.
        """
        if "fake" not in state:
            raise ValueError(
                "the checkpoint holds no fake score, it is of another kind of run: set run.name to start another"
            )
        super().load(tensors, state)
        self.fake_optimizer.load_state_dict(state["fake"])
