"""Feedback learning: one optimiser step of Eq. 17 on a LoRA above the TSCD model.

The TSCD LoRA is merged into the base, so that the bare base is the TSCD model (the regulariser's reference, at no
memory) and the student's adapter is the feedback LoRA alone.

Shapes: x0, x_T, x_t (B, C, h, w) latents; images (B, 3, H, W) in [0, 1]; t (B,).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from hypersd_ray.config.base import RunError
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import edges
from hypersd_ray.diffusion.solver import ode_solve
from hypersd_ray.losses.feedback import loss_drift, loss_feedback, loss_percep
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.export import merge_lora
from hypersd_ray.models.lora_file import alpha_of, read_lora
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.roles import STUDENT, TEACHER, LoRARoles, Roles
from hypersd_ray.models.scoring import RewardClient
from hypersd_ray.training.distributed import max_over_workers, world_size
from hypersd_ray.training.learner import learner_of
from hypersd_ray.training.metrics import averaged
from hypersd_ray.training.pictures import decode, diversity, saturation
from hypersd_ray.training.progress import Progress, learning_rate
from hypersd_ray.training.protocol import Saved
from hypersd_ray.training.randomness import generator_of
from hypersd_ray.training.rewarded import aes_of, mean
from hypersd_ray.training.tscd import Batch
from hypersd_ray.training.watch import HackingWatch, Looks

WARN = logging.getLogger(__name__).warning
Annotations = Callable[[str], Instances | None]
"""A picture's key -> its objects at the training resolution; None where it has no annotation."""
ANNOTATED_WITHIN = 1000
"""Pictures of all workers among which at least one must be annotated, where there are annotations."""


@dataclass(frozen=True)
class Denoised:
    """x0 (B, C, h, w): the student's x'_0 with gradient; reference: the TSCD model's from the same x_t; steps: length
    of the few-step sampler that went there, 0 from a picture."""

    x0: Tensor
    reference: Tensor
    steps: int = 0


def build_roles(config: FeedbackConfig, device: torch.device | str) -> LoRARoles:
    """The base with the TSCD LoRA merged in, and a fresh feedback LoRA as the student.

    Raises:
        ValueError: base or LoRA cannot be loaded, or do not fit each other.
    """
    info = read_base(config.teacher)
    tensors, metadata = read_lora(config.tscd)
    unet = load_unet(info, torch.float32, "cpu")
    # In float32, and only then cast: merged into bfloat16 the update would round away.
    merge_lora(unet, tensors, alpha_of(tensors, metadata))
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    return LoRARoles(
        unet.to(device, dtype), info.schedule, info.parameterization,
        config.lora.rank, config.lora.effective_alpha, seed=config.run.seed,
    )  # fmt: skip


def predict_with_gradient(roles: Roles, x_t: Tensor, t: int, cond: Conditioning, drift: bool) -> Denoised:
    """x'_0 of the student at (x_t, t), and the TSCD model's where the regulariser wants it."""
    time = torch.full((len(x_t),), t, device=x_t.device)
    x0 = roles.predict(STUDENT, x_t, time, cond).x0
    with torch.no_grad():
        reference = roles.predict(TEACHER, x_t, time, cond).x0 if drift else x0.detach()
    return Denoised(x0, reference)


def walk(roles: Roles, x: Tensor, times: Sequence[int], cond: Conditioning) -> Tensor:
    """The student's jumps along `times`, without gradient."""
    with torch.no_grad():
        return ode_solve(roles.schedule, roles.denoiser(STUDENT, cond), x, times)


def denoise_from_noise(
    roles: Roles, config: FeedbackConfig, cond: Conditioning, shape: tuple[int, ...], generator: torch.Generator
) -> Denoised:
    """ReFL: from x_T by the few-step sampler to a random one of `ReFLConfig.candidates`, x'_0 there (Sec. 2.3)."""
    lengths = config.refl.steps
    steps = lengths[int(torch.randint(len(lengths), (), generator=generator))]
    candidates = config.refl.candidates(steps)
    index = candidates[int(torch.randint(len(candidates), (), generator=generator))]
    times = edges(roles.schedule.T, steps)[::-1][: index + 1]
    x_T = torch.randn(shape, generator=generator).to(cond.prompt_embeds.device)
    made = predict_with_gradient(roles, walk(roles, x_T, times, cond), times[-1], cond, config.drift > 0)
    return replace(made, steps=steps)


def denoise_from_picture(roles: Roles, config: FeedbackConfig, batch: Batch, generator: torch.Generator) -> Denoised:
    """Structure: x_0 noised to `start` (Eq. 1), denoised to `denoise_to`, x'_0 there (Sec. 3.2)."""
    times = config.structure.times()
    eps = torch.randn(batch.x0.shape, generator=generator).to(batch.x0.device)
    x_t = add_noise(roles.schedule, batch.x0, eps, torch.full((len(eps),), times[0], device=eps.device))
    x_t = walk(roles, x_t, times, batch.cond)
    return predict_with_gradient(roles, x_t, times[-1], batch.cond, config.drift > 0)


class Feedback:
    """Student, optimiser and progress of one worker; the loop's surface is `Distiller`'s.

    Args:
        config: the run.
        roles: from `build_roles`.
        vae: the base's autoencoder, float32, frozen.
        client: scores, from actors or from this process.
        annotations: objects of the shards' pictures; None where there are none.
        rank: this worker's, for its randomness.
        tell: takes a line that the user should read.
    """

    def __init__(
        self, config: FeedbackConfig, roles: Roles, vae: AutoencoderKL, client: RewardClient,
        annotations: Annotations | None = None, rank: int = 0,
        tell: Callable[[str], None] = WARN,
    ):  # fmt: skip
        self.tell = tell
        self.config, self.roles, self.vae, self.client, self.rank = config, roles, vae, client, rank
        self.annotations = annotations
        self.looked_up, self.annotated, self.last_key = 0, 0, ""  # pictures of this worker
        self.annotated_checked = False
        self.progress = Progress()
        self.hacking = HackingWatch(config.watch.patience, config.watch.smoothing)
        self.watched: dict[str, Tensor] = {}
        self.student = learner_of(roles, STUDENT, config.optim)

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
        self.progress.stage, self.progress.step = self.progress.stage + 1, 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on this worker's share; returns detached scalars.

        A step whose gradient has a NaN or inf on any worker changes nothing but the counts in `progress`.
        """
        c, parts, progress = self.config, self.config.optim.accumulation, self.progress
        lengths = c.refl.steps if c.refl.weight else (0,)
        looks = Looks(lengths, batch.x0.device) if c.watched and progress.step % c.watch.every == 0 else None
        totals = averaged(
            (
                self._backward(
                    micro, generator_of(c.run.seed, "feedback", self.rank, progress.step, index), parts, looks
                )
                for index, micro in enumerate(batch.chunks(parts))
            ),
            parts,
        )
        if looks is not None:
            self._watch(looks)
        if self.annotations is not None:
            totals["annotated"] = torch.tensor(self.annotated / max(1, self.looked_up))
            self._check_annotated()
        totals["grad_norm"] = self._update()
        dropped = {f"dropped/{name}": torch.tensor(float(n)) for name, n in self.client.dropped.items()}
        progress.step += 1
        waited = {"reward_seconds": torch.tensor(self.client.take_seconds())}
        return totals | dropped | self.watched | waited

    def _backward(
        self, micro: Batch, generator: torch.Generator, parts: int, looks: Looks | None = None
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of one micro-batch. Each branch goes backward by itself: one graph at a time.

        Its scores are added to `looks`, where this is a step of the watch.
        """
        c, total = self.config, torch.zeros((), device=micro.x0.device)
        metrics: dict[str, Tensor] = {}
        if c.refl.weight:
            made = denoise_from_noise(self.roles, c, micro.cond, tuple(micro.x0.shape), generator)
            images = decode(self.vae, made.x0, c.decode_batch)
            aes, scores = self._aes(images, micro.captions)
            drift = loss_drift(made.x0, made.reference)
            loss = loss_feedback(aes, 0.0, drift, c.refl.weight, 0.0, c.drift)
            self.student.backward(loss / parts)
            total = total + loss.detach()
            metrics |= {"aes": aes.detach(), "drift": drift.detach()} | scores
            metrics |= self._look(images.detach(), micro.captions, scores, made.steps, looks)
        if c.structure.weight:
            made = denoise_from_picture(self.roles, c, micro, generator)
            images = decode(self.vae, made.x0, c.decode_batch)
            percep = self._percep(images, micro)
            drift = loss_drift(made.x0, made.reference)
            loss = loss_feedback(0.0, percep, drift, 0.0, c.structure.weight, c.drift)
            self.student.backward(loss / parts)
            total = total + loss.detach()
            metrics |= {"percep": percep.detach(), "drift_structure": drift.detach()}
            if not c.refl.weight:  # what it learns from then is the structure alone: less loss is more reward
                trained = {"structure": -percep.detach()}
                metrics |= self._look(images.detach(), micro.captions, trained, made.steps, looks)
        return metrics | {"loss": total}

    def _aes(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """L_aes of Eq. 15 and each reward's mean."""
        return aes_of(self.client, self.config.trained, images, prompts)

    def _percep(self, images: Tensor, micro: Batch) -> Tensor:
        """L_percep of Eq. 16."""
        find = self.annotations or (lambda key: None)
        told: list[Instances | Tensor | None] = [find(key) for key in micro.keys]
        without = [i for i, t in enumerate(told) if t is None]
        self.looked_up, self.annotated = self.looked_up + len(told), self.annotated + len(told) - len(without)
        self.last_key = micro.keys[-1]
        if without:
            with torch.no_grad():
                real = decode(self.vae, micro.x0[without], self.config.decode_batch)
            for i, picture in zip(without, real, strict=True):
                told[i] = picture
        name = self.config.structure.model.name
        scores = self.client(images, {name: told})[name]
        return loss_percep(scores.values, scores.valid)

    def _look(
        self, images: Tensor, prompts: Sequence[str], trained: dict[str, Tensor], steps: int, looks: Looks | None
    ) -> dict[str, Tensor]:
        """Saturation and diversity of pictures just made; for the watch their held-out rewards beside the trained ones."""
        if looks is not None:
            told: dict[str, Sequence[str]] = {r.name: list(prompts) for r in self.config.watched}
            held = self.client(images, told, gradient=False)
            looks.add(steps, trained, {f"watch/{name}": mean(scores) for name, scores in held.items()})
        return {"saturation": saturation(images), "diversity": diversity(images)}

    def _watch(self, looks: Looks) -> None:
        """What all workers saw in this step; a warning when the held-out rewards fall while trained ones rise."""
        trained, held = looks.together()
        self.watched = {name: looks.mean(name) for name in held}
        if self.hacking.measure(trained, held):
            risen = self.hacking.risen
            lower = "the rewards' alpha" if self.config.refl.weight else "structure.weight"
            self.tell(
                f"step {self.progress.step}: {', '.join(risen)} rise{'s' * (len(risen) == 1)} while "
                f"{', '.join(held)} fall{'s' * (len(held) == 1)}: likely reward hacking; raise drift={self.config.drift:g}, "
                f"lower {lower}, or stop here"
            )
        self.watched["hacking"] = torch.tensor(float(self.hacking.alarm))

    def _check_annotated(self) -> None:
        """Once there were enough pictures, on all workers at once.

        Raises:
            RunError: none was annotated: the keys are not the annotations'.
        """
        if self.annotated_checked or self.looked_up * world_size() < ANNOTATED_WITHIN:
            return
        self.annotated_checked = True
        if max_over_workers(self.annotated, self.roles.device) == 0:
            raise RunError(
                f"structure.annotations={self.config.structure.annotations} has none of the first {self.looked_up} pictures, "
                f"the last of them {self.last_key!r}: keys in the shards must be its file names without suffix; name the "
                "shards' own annotations, or set structure.annotations=''"
            )

    def _update(self) -> Tensor:
        """Average, clip, step; returns the gradient's norm."""
        progress = self.progress
        norm = self.student.step(learning_rate(self.config.optim, progress.step, self.steps))
        progress.count(bool(torch.isfinite(norm)))
        return norm

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The student and its moments."""
        yield STUDENT, self.roles.gather(STUDENT)
        yield f"{STUDENT}-moments", self.student.moments()

    def notes(self) -> dict[str, Any]:
        """Progress, and what was counted and compared so far."""
        return {
            "progress": asdict(self.progress),
            "dropped": dict(self.client.dropped),
            "watch": {"row": self.hacking.row, "means": dict(self.hacking.means)},
            "watched": {name: float(v) for name, v in self.watched.items()},
        }

    def load(self, saved: Saved, notes: dict[str, Any]) -> None:
        """Bring back what `parts` and `notes` gave.

        Raises:
            ValueError: they are of another configuration.
        """
        self.roles.load(STUDENT, saved(STUDENT))
        self.progress = Progress(**notes["progress"])
        self.student.load_moments(saved(f"{STUDENT}-moments"))
        self.client.dropped = dict(notes["dropped"])
        self.hacking.row, self.hacking.means = notes["watch"]["row"], dict(notes["watch"]["means"])
        self.watched = {name: torch.tensor(v) for name, v in notes["watched"].items()}
