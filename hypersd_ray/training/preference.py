"""Fit a reward model to human preference (Eq. 11): state and one optimiser step. Its surface is `Distiller`'s.

Shapes: chosen, rejected (B, 3, R, R) in [0, 1]; scores (B,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor, nn

from hypersd_ray.config.preference import PreferenceConfig
from hypersd_ray.losses.feedback import loss_rm
from hypersd_ray.models.rewards.image_reward import ImageReward
from hypersd_ray.models.rewards.protocol import RewardModel
from hypersd_ray.training.distiller import Progress, learning_rate
from hypersd_ray.training.distributed import average_gradients
from hypersd_ray.training.randomness import seed_of


class Pairs(Protocol):
    """What a batch of preferences has."""

    @property
    def chosen(self) -> Tensor:
        """Preferred pictures."""

    @property
    def rejected(self) -> Tensor:
        """The others."""

    @property
    def prompts(self) -> Sequence[str]:
        """What both were made for."""

    def chunks(self, parts: int) -> Sequence[Pairs]:
        """Equal micro-batches."""


def freeze_bottom(model: ImageReward, share: float) -> list[nn.Parameter]:
    """Fix the embeddings and the lowest `share` of the layers of both encoders; returns what learns, in order."""
    model.requires_grad_(True)
    for encoder, layers in ((model.vision, model.vision.encoder.layers), (model.text, model.text.encoder.layer)):
        fixed = round(share * len(layers))
        if fixed:
            encoder.embeddings.requires_grad_(False)
        for layer in layers[:fixed]:
            layer.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def scores_of_pairs(model: RewardModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """r(c, x_w), r(c, x_l): one call for both, so that both see the same dropout schedule."""
    both = model(torch.cat([pairs.chosen, pairs.rejected]), [*pairs.prompts, *pairs.prompts])
    return both.chunk(2)


@torch.no_grad()
def pairwise_accuracy(model: RewardModel, batches: Iterable[Pairs]) -> Tensor:
    """(N,) of 1 where the preferred picture scores higher, 1/2 for a tie, else 0: its mean is the accuracy."""
    was, _ = model.training, model.eval()
    hits = []
    for pairs in batches:
        r_w, r_l = scores_of_pairs(model, pairs)
        hits.append((r_w > r_l).float() + 0.5 * (r_w == r_l).float())
    model.train(was)
    return torch.cat(hits)


class PreferenceTraining:
    """Model, optimiser and progress of one worker."""

    def __init__(self, config: PreferenceConfig, model: ImageReward, rank: int = 0):
        self.config, self.model, self.rank = config, model.train(), rank
        self.learning = freeze_bottom(model, config.freeze)
        self.progress = Progress()
        c = config.optim
        self.optimizer = torch.optim.AdamW(
            self.learning, lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay
        )

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.config.steps

    @property
    def finished(self) -> bool:
        """All steps are done and `next_stage` was called."""
        return self.progress.stage == 1

    def next_stage(self) -> None:
        """There is one stage: the run is finished."""
        self.progress.stage, self.progress.step = 1, 0

    def step(self, batch: Pairs) -> dict[str, Tensor]:
        """One optimiser step on this worker's pairs; returns detached scalars.

        A step whose gradient has a NaN or inf on any worker changes nothing but the counts in `progress`.
        """
        parts, progress = self.config.optim.accumulation, self.progress
        totals: dict[str, Tensor] = {}
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.config.run.seed, "dropout", self.rank, progress.step))
            for micro in batch.chunks(parts):
                r_w, r_l = scores_of_pairs(self.model, micro)
                loss = loss_rm(r_w, r_l).mean()
                (loss / parts).backward()
                found = {
                    "loss": loss.detach(), "accuracy": (r_w > r_l).float().mean(), "margin": (r_w - r_l).detach().mean()
                }  # fmt: skip
                for name, value in found.items():
                    totals[name] = totals.get(name, 0) + value / parts
        totals["grad_norm"] = self._update()
        progress.step += 1
        return totals

    def _update(self) -> Tensor:
        progress = self.progress
        for p in self.learning:
            if p.grad is None:  # a pooling layer that the score does not use
                p.grad = torch.zeros_like(p)
        average_gradients(self.learning)
        norm = nn.utils.clip_grad_norm_(self.learning, self.config.optim.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optim, progress.step, self.steps)
            self.optimizer.step()
        progress.skipped += not finite
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        self.optimizer.zero_grad()
        return norm.detach()

    def tensors(self) -> dict[str, Tensor]:
        """The whole model, so that a checkpoint is usable by itself."""
        return {name: t.detach() for name, t in self.model.state_dict().items()}

    def optimizer_state(self) -> dict:
        """Moments and progress."""
        return {"progress": asdict(self.progress), "model": self.optimizer.state_dict()}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Bring back what `tensors` and `optimizer_state` gave. Raises ValueError when they are of another model."""
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another reward model: {str(error).splitlines()[0]}") from None
        self.progress = Progress(**state["progress"])
        self.optimizer.load_state_dict(state["model"])
