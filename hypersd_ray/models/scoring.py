"""Scores of generated pictures with a gradient, from shared actors or from models in this process: the same call.

    scores = client(images, {"aesthetic_v2": prompts, "solo": annotations})
    loss = ((alpha - scores["aesthetic_v2"].values).relu() * scores["aesthetic_v2"].valid).mean()
    loss.backward()                                  # reaches `images`

Shapes: images (B, 3, H, W) float in [0, 1]; values (B,) float32; valid (B,) bool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.models.evaluators import Evaluator, evaluate, load_evaluator
from hypersd_ray.models.rewards.protocol import Scored

Told = Mapping[str, Sequence[Any]]
"""Model name -> one entry a sample (a prompt, an annotation or a real picture)."""
Backend = Callable[[Tensor, Told, bool], dict[str, Scored]]
"""(images without a graph, told, with gradient) -> values and gradients by model."""


@dataclass(frozen=True, eq=False)
class Scores:
    """values (B,), in the graph when a gradient was asked for; 0 with no gradient where `valid` is False."""

    values: Tensor
    valid: Tensor


class _Score(torch.autograd.Function):
    """forward asks for scores and their gradients in one call, backward multiplies."""

    @staticmethod
    def forward(ctx, images: Tensor, call: Callable[[Tensor], Sequence[Scored]]) -> Tensor:
        scored = call(images.detach())
        ctx.save_for_backward(*[s.gradient.to(images) for s in scored])  # type: ignore[union-attr]
        return torch.stack([s.values for s in scored])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_values: Tensor) -> tuple[Tensor, None]:
        total = None
        for row, gradient in zip(d_values, ctx.saved_tensors, strict=True):
            part = row.to(gradient).view(-1, 1, 1, 1) * gradient
            total = part if total is None else total + part
        return total, None  # type: ignore[return-value]


class RewardClient:
    """Where a training step gets its scores. It does not know what is behind `backend`.

    Attributes:
        dropped: model -> samples whose score or gradient was NaN or infinite so far.
        seconds: time spent waiting for the backend since `take_seconds`.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.dropped: dict[str, int] = {}
        self.seconds = 0.0

    def take_seconds(self) -> float:
        """`seconds`, which begins anew."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def __call__(self, images: Tensor, told: Told, gradient: bool = True) -> dict[str, Scores]:
        """Scores of every model in `told`, asked at the same time.

        A sample whose score or gradient is not finite is marked invalid and counted; the others are as without it.
        """
        valid: dict[str, Tensor] = {}

        def call(pixels: Tensor) -> list[Scored]:
            if pixels.is_cuda:
                torch.cuda.synchronize(pixels.device)  # or the pictures' making would count as waiting for their scores
            begun, clean = time.perf_counter(), []
            answers = self.backend(pixels, told, gradient)
            self.seconds += time.perf_counter() - begun
            for name, scored in answers.items():
                scored, valid[name] = _only_finite(scored, pixels)
                self.dropped[name] = self.dropped.get(name, 0) + int((~valid[name]).sum())
                clean.append(scored)
            return clean

        values = _Score.apply(images, call) if gradient else torch.stack([s.values for s in call(images.detach())])
        return {name: Scores(values[i], valid[name]) for i, name in enumerate(valid)}


def _only_finite(scored: Scored, like: Tensor) -> tuple[Scored, Tensor]:
    values, gradient = scored.values.to(like.device), scored.gradient
    valid = torch.isfinite(values)
    if gradient is not None:
        valid = valid & torch.isfinite(gradient).flatten(1).all(1)
        gradient = torch.where(valid.view(-1, 1, 1, 1), gradient, 0.0)
    return Scored(torch.where(valid, values, 0.0), gradient), valid


class LocalBackend:
    """Models in this process, in float32: for one GPU, and without Ray."""

    def __init__(self, evaluators: Mapping[str, Evaluator]):
        self.evaluators = evaluators

    def __call__(self, images: Tensor, told: Told, gradient: bool) -> dict[str, Scored]:
        return {name: evaluate(self.evaluators[name], images, told[name], gradient) for name in told}


def local_backend(
    models: Sequence[RewardConfig | PerceptionConfig], device: torch.device | str, precision: str = "fp32"
) -> LocalBackend:
    """Load `models` into this process. Raises ValueError for a checkpoint that does not fit."""
    return LocalBackend({m.name: load_evaluator(m, device, precision) for m in models})
