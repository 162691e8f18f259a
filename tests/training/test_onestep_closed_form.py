"""The one-step training step with Gaussian networks: where its generator must end is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hypersd_ray.diffusion.parameterization import Prediction
from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import STUDENT, TEACHER, Roles
from hypersd_ray.training.onestep import OneStep
from hypersd_ray.training.tscd import Batch
from tests.training.onestep_parts import config

COND, NULL, STD = 0.9, 0.3, 0.6
"""Means of the teacher's two Gaussians and their standard deviation."""


class GaussianRoles(Roles):
    """Each role knows one Gaussian N(mean, std^2). Score networks answer with its posterior mean; the student maps
    noise to mean + std * noise in whatever step it is asked, so one step of it is a sample of its Gaussian."""

    def __init__(self) -> None:
        self.schedule, self.device, self.dtype = scaled_linear(), torch.device("cpu"), torch.float32
        self.known: dict[str, dict[str, nn.Parameter]] = {}
        self.add(STUDENT, trainable=True)
        self.add("ema")

    def add(self, role: str, like: str | None = None, trainable: bool = False) -> None:
        self.known[role] = {
            "mean": nn.Parameter(torch.zeros(4), requires_grad=trainable),
            "log_std": nn.Parameter(torch.full((4,), -1.0), requires_grad=trainable),
        }

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self.known[role]

    def predict(self, role: str, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        alpha, sigma = self.schedule.at(t)
        if role == TEACHER:  # the conditioning is the mean
            mean, std = cond.prompt_embeds[:, :1, :1, None], torch.tensor(STD)
        else:
            mean, std = (p.view(1, 4, 1, 1) for p in (self.known[role]["mean"], self.known[role]["log_std"].exp()))
        if role in (STUDENT, "ema"):
            x0 = mean + std * x_t
        else:
            x0 = mean + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


@pytest.mark.parametrize("mode", ["unified", "dedicated"])
def test_the_student_becomes_the_guided_teacher(mode, tmp_path):
    # Guidance 2 between two Gaussians of one width is a third: mean NULL + 2 (COND - NULL), the same width.
    settings = config(
        tmp_path, mode=mode, consistency_share=0.0, distill={"steps_list": (400,)},
        dmd={"guidance": 2.0, "fake_updates": 4, "fake_lr": 0.03, "warmup_share": 0.05},
        optim={"lr": 0.02, "batch": 64, "schedule": "cosine"},
    )  # fmt: skip
    roles = GaussianRoles()
    training = OneStep(settings, roles, Conditioning(torch.full((1, 1, 1), NULL)))
    batch = Batch(torch.zeros(64, 4, 2, 2), Conditioning(torch.full((64, 1, 1), COND)))
    for _ in range(400):
        training.step(batch)
    student, fake = roles.known[STUDENT], roles.known["fake"]
    goal = NULL + 2.0 * (COND - NULL)
    torch.testing.assert_close(student["mean"].detach(), torch.full((4,), goal), rtol=0, atol=0.06)
    torch.testing.assert_close(student["log_std"].detach().exp(), torch.full((4,), STD), rtol=0.1, atol=0)
    torch.testing.assert_close(fake["mean"].detach(), student["mean"].detach(), rtol=0, atol=0.06)
    torch.testing.assert_close(fake["log_std"].detach(), student["log_std"].detach(), rtol=0, atol=0.1)
