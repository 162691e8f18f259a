"""A distillation run's state and its optimiser step: what Algorithm 1's inner loop does to it.

A `Distiller` knows neither Ray nor where batches come from; the same calls with the same batches give the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, Roles
from hypersd_ray.training.adversarial import Adversary, adversarial_losses, adversary_of
from hypersd_ray.training.learner import Learner, Replicated, learner_of
from hypersd_ray.training.metrics import averaged
from hypersd_ray.training.progress import Progress, learning_rate
from hypersd_ray.training.protocol import Saved
from hypersd_ray.training.randomness import generator_of, seed_of
from hypersd_ray.training.tscd import Batch, Pair, consistency_loss, distance, empty_some, make_pair


class Distiller:
    """Roles, discriminator, optimisers and progress of one worker.

    Args:
        config: the run.
        roles: student and EMA on the base.
        null: the unconditional input of guidance, batch 1.
        rank: this worker's, for its randomness.
    """

    def __init__(self, config: TSCDConfig, roles: Roles, null: Conditioning, rank: int = 0):
        self.config, self.roles, self.null, self.rank = config, roles, null, rank
        self.progress = Progress()
        self.measure = distance(config.distill)
        if config.distill.teacher == "previous" and config.stages > 1:
            roles.add(PREVIOUS)
        self.student = learner_of(roles, STUDENT, config.optim)
        self._enter_stage()

    @property
    def steps(self) -> int:
        """Of the present stage."""
        return self.config.distill.steps_list[self.progress.stage]

    @property
    def finished(self) -> bool:
        """No stage is left."""
        return self.progress.stage == self.config.stages

    def next_stage(self) -> None:
        """Go on to the next stage from this one's weights; moments and discriminator start anew."""
        self.progress.stage, self.progress.step = self.progress.stage + 1, 0
        if self.finished:
            return
        k_before, k = self.config.distill.k_list[self.progress.stage - 1 : self.progress.stage + 1]
        if self.config.distill.teacher == "previous" and k < k_before:
            self.roles.copy(STUDENT, PREVIOUS)
        self.roles.copy(STUDENT, EMA)
        self._enter_stage()

    def _enter_stage(self) -> None:
        """The present stage's loss weights and discriminator; moments anew."""
        stage = min(self.progress.stage, self.config.stages - 1)  # none is left: the last one's are as good as any
        self.student.forget()
        self.weights = self.config.adversarial.weights(stage, self.config.stages)
        self.adversary: Adversary | None = None
        if self.weights.adversarial > 0:
            network = LatentDiscriminator(
                dict(self.roles.unet.config),
                seed_of(self.config.run.seed, "discriminator", stage),
                self.config.adversarial.is_conditional(stage),
            )
            self.adversary = adversary_of(network.to(self.roles.device), self.config.adversarial.lr)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on this worker's share of the batch; returns detached scalars.

        A step whose gradient has a NaN or inf on any worker changes nothing but the counts in `progress`.
        """
        parts = self.config.optim.accumulation
        micros = enumerate(batch.chunks(parts))
        totals = averaged((self._backward(micro, self._generator(index), parts) for index, micro in micros), parts)
        totals["grad_norm"] = self._update()
        self.progress.step += 1
        return totals

    def _generator(self, *what: int | str) -> torch.Generator:
        """The randomness of `what` in the present step, a micro-batch's number first."""
        return generator_of(self.config.run.seed, self.rank, self.progress.stage, self.progress.step, *what)

    def _backward(self, micro: Batch, generator: torch.Generator, parts: int) -> dict[str, Tensor]:
        """Accumulate the gradients of one micro-batch."""
        micro = empty_some(micro, self.null, self.config.distill.empty_prompts, generator)
        pair = make_pair(self.roles, micro, self.null, self.config.distill, self.progress.stage, generator)
        consistency = consistency_loss(pair, self.measure)
        loss, metrics = self.weights.mse * consistency, {"consistency": consistency.detach()}
        if self.adversary is not None:
            adversarial, found = self._judge(self.adversary, pair, micro.cond, generator, parts)
            loss = loss if adversarial is None else loss + adversarial
            metrics |= found
        self.student.backward(loss / parts)
        return metrics | {"loss": loss.detach()}

    def _judge(
        self, adversary: Adversary, pair: Pair, cond: Conditioning, generator: torch.Generator, parts: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The discriminator's loss backward; (the student's with its weight, None while it does not hear of it; metrics)."""
        settings = self.config.adversarial
        student, discriminator = adversarial_losses(self.roles, adversary.network, pair, cond, settings.kind, generator)
        adversary.learner.backward(discriminator / parts)
        told = self.progress.step >= settings.warmup_share * self.steps
        metrics = {"adversarial": student.detach(), "discriminator": discriminator.detach()}
        return self.weights.adversarial * student if told else None, metrics

    @property
    def _heads(self) -> Replicated | None:
        """What learns the discriminator's heads, where they wait for a step."""
        return self.adversary.learner if self.adversary is not None and self.adversary.learner.pending else None

    def _update(self) -> Tensor:
        """Average, clip, step; returns the student's gradient norm."""
        config, progress, finite, norm = self.config, self.progress, True, torch.zeros(())
        heads = self._heads
        if heads is not None:
            finite = bool(torch.isfinite(heads.reduce()))
        if self.student.pending:
            norm = self.student.step(learning_rate(config.optim, progress.step, self.steps), hold=not finite)
            finite = finite and bool(torch.isfinite(norm))
        if heads is not None:
            heads.step(config.adversarial.lr, hold=not finite)
        if finite:
            self.roles.ema_update(config.distill.ema_decay)
        progress.count(finite)
        return norm

    def _role_names(self) -> list[str]:
        previous = [PREVIOUS] if self.config.distill.teacher == "previous" and self.config.stages > 1 else []
        return [STUDENT, EMA, *previous]

    def _learners(self) -> dict[str, Learner]:
        return {STUDENT: self.student}

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each role's tensors, each learner's moments, the discriminator and its own."""
        for role in self._role_names():
            yield role, self.roles.gather(role)
        for role, learner in self._learners().items():
            yield f"{role}-moments", learner.moments()
        if self.adversary is not None:
            yield "discriminator", self.adversary.network.state_dict()
            yield "discriminator-moments", self.adversary.learner.moments()

    def notes(self) -> dict[str, Any]:
        """The progress."""
        return {"progress": asdict(self.progress)}

    def load(self, saved: Saved, notes: dict[str, Any]) -> None:
        """Bring back what `parts` and `notes` gave.

        Raises:
            ValueError: they are of another configuration.
        """
        self.progress = Progress(**notes["progress"])
        self._enter_stage()
        if not self.roles.load_own(saved.folder):
            for role in self._role_names():
                self.roles.load(role, saved(role))
            for role, learner in self._learners().items():
                learner.load_moments(saved(f"{role}-moments"))
        if self.adversary is not None:
            self.adversary.network.load_state_dict(dict(saved("discriminator")))
            self.adversary.learner.load_moments(saved("discriminator-moments"))
