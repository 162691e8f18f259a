"""Fit a reward model to human preference (Eq. 11): state and one optimiser step. Its surface is `Distiller`'s.

Shapes: chosen, rejected (B, 3, R, R) in [0, 1]; scores (B,).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hypersd_ray.config.preference import PreferenceConfig
from hypersd_ray.losses.feedback import loss_rm
from hypersd_ray.models.rewards.image_reward import ImageReward
from hypersd_ray.models.rewards.protocol import RewardModel
from hypersd_ray.training.learner import adamw
from hypersd_ray.training.metrics import averaged
from hypersd_ray.training.progress import Progress, learning_rate
from hypersd_ray.training.protocol import Saved
from hypersd_ray.training.randomness import seed_of

MODEL = "model"


class PreferencePairs(Protocol):
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

    def chunks(self, parts: int) -> Sequence[PreferencePairs]:
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


def scores_of_pairs(model: RewardModel, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
    """r(c, x_w), r(c, x_l): one call for both, so that both see the same dropout schedule."""
    both = model(torch.cat([pairs.chosen, pairs.rejected]), [*pairs.prompts, *pairs.prompts])
    return both.chunk(2)


@torch.no_grad()
def pairwise_accuracy(model: RewardModel, batches: Iterable[PreferencePairs]) -> Tensor:
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
        names = {id(p): name for name, p in model.named_parameters()}
        self.learner = adamw({names[id(p)]: p for p in self.learning}, config.optim)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.config.steps

    @property
    def finished(self) -> bool:
        """All steps are done and `next_stage` was called."""
        return self.progress.stage == 1

    def next_stage(self) -> None:
        """There is one stage: the run is finished."""
        self.progress.stage, self.progress.step = 1, 0

    def step(self, batch: PreferencePairs) -> dict[str, Tensor]:
        """One optimiser step on this worker's pairs; returns detached scalars.

        A step whose gradient has a NaN or inf on any worker changes nothing but the counts in `progress`.
        """
        parts, progress = self.config.optim.accumulation, self.progress
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.config.run.seed, "dropout", self.rank, progress.step))
            totals = averaged((self._backward(micro, parts) for micro in batch.chunks(parts)), parts)
        totals["grad_norm"] = self._update()
        progress.step += 1
        return totals

    def _backward(self, micro: PreferencePairs, parts: int) -> dict[str, Tensor]:
        """Accumulate the gradients of one micro-batch."""
        r_w, r_l = scores_of_pairs(self.model, micro)
        loss = loss_rm(r_w, r_l).mean()
        (loss / parts).backward()
        return {"loss": loss.detach(), "accuracy": (r_w > r_l).float().mean(), "margin": (r_w - r_l).detach().mean()}

    def _update(self) -> Tensor:
        progress = self.progress
        for p in self.learning:
            if p.grad is None:  # a pooling layer that the score does not use
                p.grad = torch.zeros_like(p)
        norm = self.learner.step(learning_rate(self.config.optim, progress.step, self.steps))
        progress.count(bool(torch.isfinite(norm)))
        return norm

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The whole model, so that a checkpoint is usable by itself, and its moments."""
        yield MODEL, {name: t.detach() for name, t in self.model.state_dict().items()}
        yield f"{MODEL}-moments", self.learner.moments()

    def notes(self) -> dict[str, Any]:
        """The progress."""
        return {"progress": asdict(self.progress)}

    def load(self, saved: Saved, notes: dict[str, Any]) -> None:
        """Bring back what `parts` and `notes` gave. Raises ValueError when they are of another model."""
        try:
            self.model.load_state_dict(dict(saved(MODEL)))
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another reward model: {str(error).splitlines()[0]}") from None
        self.progress = Progress(**notes["progress"])
        self.learner.load_moments(saved(f"{MODEL}-moments"))
