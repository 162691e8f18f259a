"""A distillation run's state and its optimiser step: what Algorithm 1's inner loop does to it.

A `Distiller` knows neither Ray nor where batches come from; the same calls with the same batches give the same weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hypersd_ray.config.tscd import OptimConfig, TSCDConfig
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, Roles
from hypersd_ray.training.adversarial import adversarial_losses
from hypersd_ray.training.distributed import average_gradients
from hypersd_ray.training.randomness import generator_of, seed_of
from hypersd_ray.training.tscd import Batch, consistency_loss, distance, empty_some, make_pair


@dataclass
class Progress:
    """Where a run is: `step` counts within `stage`; `skipped` are steps lost to NaN, `bad_in_a_row` the latest of them."""

    stage: int = 0
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of `step` of a stage of `steps`: linear warm-up, then constant or a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


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
        self._new_optimizers()

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
        self._new_optimizers()

    def _new_optimizers(self) -> None:
        c, stage = self.config.optim, self.progress.stage
        self.optimizer = torch.optim.AdamW(
            self.roles.trainable(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay,
            fused=True,  # one pass over the moments, no temporaries
        )  # fmt: skip
        self.weights = self.config.adversarial.weights(stage, self.config.stages)
        self.discriminator = self.d_optimizer = None
        if self.weights.adversarial > 0:
            heads = LatentDiscriminator(
                dict(self.roles.unet.config),
                seed_of(self.config.run.seed, "discriminator", stage),
                self.config.adversarial.is_conditional(stage),
            )
            self.discriminator = heads.to(self.roles.device)
            self.d_optimizer = torch.optim.AdamW(heads.parameters(), lr=self.config.adversarial.lr, betas=(0.0, 0.99))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on this worker's share of the batch; returns detached scalars.

        A step whose gradient has a NaN or inf on any worker changes nothing but the counts in `progress`.
        """
        progress, parts = self.progress, self.config.optim.accumulation
        totals: dict[str, Tensor] = {}
        for index, micro in enumerate(batch.chunks(parts)):
            generator = generator_of(self.config.run.seed, self.rank, progress.stage, progress.step, index)
            for name, value in self._backward(micro, generator, parts).items():
                totals[name] = totals.get(name, 0) + value / parts
        totals["grad_norm"] = self._update()
        progress.step += 1
        return totals

    def _backward(self, micro: Batch, generator: torch.Generator, parts: int) -> dict[str, Tensor]:
        """Accumulate the gradients of one micro-batch."""
        micro = empty_some(micro, self.null, self.config.distill.empty_prompts, generator)
        pair = make_pair(self.roles, micro, self.null, self.config.distill, self.progress.stage, generator)
        consistency = consistency_loss(pair, self.measure)
        loss, metrics = self.weights.mse * consistency, {"consistency": consistency.detach()}
        if self.discriminator is not None:
            student, heads = adversarial_losses(
                self.roles, self.discriminator, pair, micro.cond, self.config.adversarial.kind, generator
            )
            if self.progress.step >= self.config.adversarial.warmup_share * self.steps:
                loss = loss + self.weights.adversarial * student
            (heads / parts).backward()
            metrics |= {"adversarial": student.detach(), "discriminator": heads.detach()}
        (loss / parts).backward()
        return metrics | {"loss": loss.detach()}

    def _update(self) -> Tensor:
        """Average, clip, step; returns the student's gradient norm."""
        parameters, progress = self.roles.trainable(), self.progress
        heads = [] if self.discriminator is None else list(self.discriminator.parameters())
        average_gradients(parameters + heads)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip)
        gradients = [p.grad for p in heads if p.grad is not None]
        finite = bool(torch.isfinite(norm)) and all(bool(torch.isfinite(g).all()) for g in gradients)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optim, progress.step, self.steps)
            self.optimizer.step()
            if self.d_optimizer is not None:
                self.d_optimizer.step()
            self.roles.ema_update(self.config.distill.ema_decay)
        progress.skipped += not finite
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        self.optimizer.zero_grad()
        if self.d_optimizer is not None:
            self.d_optimizer.zero_grad()
        return norm.detach()

    def _role_names(self) -> list[str]:
        previous = [PREVIOUS] if self.config.distill.teacher == "previous" and self.config.stages > 1 else []
        return [STUDENT, EMA, *previous]

    def tensors(self) -> dict[str, Tensor]:
        """Every weight that training changes: `{role}/{name}` and `discriminator/{name}`."""
        named = {
            f"{role}/{name}": p.detach()
            for role in self._role_names()
            for name, p in self.roles.named_tensors(role).items()
        }
        if self.discriminator is not None:
            named |= {f"discriminator/{name}": p for name, p in self.discriminator.state_dict().items()}
        return named

    def optimizer_state(self) -> dict:
        """Both optimisers' moments and the progress: plain containers and tensors."""
        state = {"progress": asdict(self.progress), "student": self.optimizer.state_dict()}
        if self.d_optimizer is not None:
            state["discriminator"] = self.d_optimizer.state_dict()
        return state

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Bring back what `tensors` and `optimizer_state` gave.

        Raises:
            ValueError: they are of another configuration.
        """
        self.progress = Progress(**state["progress"])
        if self.finished:
            self.progress.stage -= 1  # no stage is left to make optimisers for; the last one's are as good as any
            self._new_optimizers()
            self.progress.stage += 1
        else:
            self._new_optimizers()
        grouped: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            grouped.setdefault(group, {})[rest] = tensor
        for role in self._role_names():
            self.roles.load(role, grouped.get(role, {}))
        self.optimizer.load_state_dict(state["student"])
        if self.discriminator is not None and self.d_optimizer is not None:
            self.discriminator.load_state_dict(grouped.get("discriminator", {}))
            self.d_optimizer.load_state_dict(state["discriminator"])
