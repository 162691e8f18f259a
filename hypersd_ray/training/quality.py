"""Measured quality of a student: how near its samples come to where the teacher's own long trajectory ends, and their
CLIP score. P prompts, each with its own x_T, a function of (seed, prompt).

Shapes: latents (P, C, h, w), per-prompt numbers (P,).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd_ray.config.measure import MeasureConfig
from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import Encoders
from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.models.rewards.registry import load_reward
from hypersd_ray.models.roles import STUDENT, Roles
from hypersd_ray.training import samples
from hypersd_ray.training.samples import Sampling


def latent_distance(latents: Tensor, reference: Tensor) -> Tensor:
    """(P,) mean squared difference over the variance of all reference latents."""
    return (latents - reference).square().flatten(1).mean(1) / reference.var()


def teacher_sha256(folder: Path) -> str:
    """Of everything that decides a trajectory: the weights of UNet and text encoders, the noise schedule."""
    weights = sorted([*folder.glob("unet/*.safetensors"), *folder.glob("text_encoder*/*.safetensors")])
    return sha256_of(*weights, folder / "unet/config.json", folder / "scheduler/scheduler_config.json")


def kept(path: Path, make) -> Tensor:
    """The latents that are in `path`; else what `make()` gives, written there."""
    if path.exists():
        return load_file(path)["latents"]
    latents = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"latents": latents.contiguous()}, partial)
    os.replace(partial, path)  # a reader never meets half a file
    return latents


@dataclass(frozen=True)
class Quality:
    """Per-prompt numbers by sampling steps, and the teacher's CLIP score at its trajectory's end."""

    distance: dict[int, list[float]]
    clip: dict[int, list[float]]
    teacher_clip: list[float]

    def means(self) -> dict[str, float]:
        """For the logs: quality/distance_1, quality/clip_1, ..."""
        named = {"distance": self.distance, "clip": self.clip}
        return {f"quality/{name}_{n}": _mean(v) for name, by_steps in named.items() for n, v in by_steps.items()}


def objective(quality: Quality, clip_weight: float) -> float:
    """Less is better: mean over the numbers of steps of ln(distance) - clip_weight ln(CLIP score / the teacher's).

    Logarithms, so that a percent counts the same at 1 step, where distances are large, and at 4. Infinite where a
    distance is not finite.
    """
    distances = [_mean(v) for v in quality.distance.values()]
    if not all(math.isfinite(d) for d in distances):
        return math.inf
    value = _mean([math.log(max(d, 1e-12)) for d in distances])
    if quality.clip and clip_weight:
        teacher = max(_mean(quality.teacher_clip), 1e-6)
        value -= clip_weight * _mean([math.log(max(_mean(v), 1e-6) / teacher) for v in quality.clip.values()])
    return value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Yardstick:
    """The prompts, their x_T, the teacher's end points and the CLIP: made once, then any student is measured with it.

    Raises:
        ValueError: the CLIP cannot be loaded.
    """

    def __init__(
        self, config: MeasureConfig, roles: Roles, encoders: Encoders, teacher: Path, shape: tuple[int, int, int],
        time_ids: Tensor | None = None,
    ):  # fmt: skip
        """`shape`: (C, h, w) of the latents; `time_ids` (1, 6): SDXL's size conditioning."""
        self.config, self.roles, self.encoders, self.time_ids = config, roles, encoders, time_ids
        self.shape = shape
        self.clip = (
            None if config.clip is None
            else load_reward(RewardConfig(name="clip_score", checkpoint=config.clip, role="watch"), roles.device)
        )  # fmt: skip
        self.reference = self._reference(teacher)
        self.teacher_clip = self._clip_scores(self.reference)

    def _reference(self, teacher: Path) -> Tensor:
        c, null = self.config, self.encoders.null_conditioning().to(self.roles.device)

        def make() -> Tensor:
            return self._chunks(
                lambda x_T, cond: samples.teacher_samples(
                    self.roles, x_T, cond, null.with_time_ids(cond.time_ids), c.reference_steps, c.guidance
                )
            )

        if c.cache is None or self.roles.together:  # all workers make it or none: one may not see what another has kept
            return make()
        key = json.dumps([teacher_sha256(teacher), c.prompts, c.seed, c.guidance, c.reference_steps, self.shape])
        return kept(Path(c.cache) / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors", make)

    def _chunks(self, sample) -> Tensor:
        c, device = self.config, self.roles.device
        parts = []
        for first in range(0, len(c.prompts), c.batch):
            chunk = list(c.prompts[first : first + c.batch])
            embeds = self.encoders.encode_prompts(chunk)
            ids = None if self.time_ids is None else self.time_ids.to(device).expand(len(chunk), -1)
            cond = Conditioning(embeds.prompt_embeds, embeds.pooled, ids).to(device)
            x_T = samples.start_noise(c.seed, chunk, self.shape).to(device)
            parts.append(sample(x_T, cond).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _clip_scores(self, latents: Tensor) -> list[float]:
        if self.clip is None:
            return []
        scores: list[float] = []
        for first in range(0, len(latents), self.config.batch):
            part = slice(first, first + self.config.batch)
            pictures = self.encoders.decode(latents[part]) / 255.0
            scores += self.clip(pictures.to(self.roles.device), list(self.config.prompts[part])).float().cpu().tolist()
        return scores

    def __call__(self, samplings: Mapping[int, Sampling], role: str = STUDENT) -> Quality:
        """Of a role's samples, by steps -> how they are made."""
        distance, clip = {}, {}
        for n, how in samplings.items():
            latents = self._chunks(
                lambda x_T, cond, how=how: samples.student_samples(self.roles, role, x_T, cond, how, self.config.seed)
            )
            distance[n] = latent_distance(latents, self.reference).tolist()
            if self.clip is not None:
                clip[n] = self._clip_scores(latents)
        return Quality(distance, clip, self.teacher_clip)
