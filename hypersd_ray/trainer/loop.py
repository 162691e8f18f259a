"""The training loop of one Ray Train worker: build, resume, step, report."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.data.plan import StreamPosition
from hypersd_ray.data.stream import LatentStream
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import LoRAMetadata, save_diffusers_lora, save_kohya_lora, save_unet
from hypersd_ray.models.roles import STUDENT, FullRoles, LoRARoles, Roles
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.logs import Loggers
from hypersd_ray.trainer.progress import Snapshot
from hypersd_ray.training import samples
from hypersd_ray.training.checkpoint import load_checkpoint, load_position, save_checkpoint, save_position
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.tscd import Batch


@dataclass(frozen=True)
class LoopArguments:
    """What the driver settles before workers start. `config` is a `TSCDConfig` as a dict; `urls` what is streamed."""

    config: dict[str, Any]
    urls: tuple[str, ...]
    board: ray.actor.ActorHandle
    reject_log: ray.actor.ActorHandle | None = None


def build_roles(config: TSCDConfig, device: torch.device | str) -> tuple[Roles, Conditioning]:
    """The base with its roles, and the unconditional input of guidance."""
    info = read_base(config.teacher)
    null = load_encoders(config.teacher, device="cpu", vae=False).null_conditioning().to(device)
    unet = load_unet(info, torch.bfloat16 if config.run.precision == "bf16" else torch.float32, device)
    parts = (unet, info.schedule, info.parameterization)
    roles = (
        FullRoles(*parts)
        if config.full_unet
        else LoRARoles(*parts, config.lora.rank, config.lora.effective_alpha, seed=config.run.seed)
    )
    if config.optim.checkpointing:
        roles.checkpoint_activations()
    return roles, null


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `arguments` are the fields of `LoopArguments`."""
    given = LoopArguments(**arguments)
    config = TSCDConfig.model_validate(given.config)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray gives a worker one OpenMP thread per reserved CPU; nobody else computes while it steps.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    roles, null = build_roles(config, device)
    Worker(config, given, Distiller(config, roles, null, context.get_world_rank()), device).run()


class Worker:
    """One worker's share of a run."""

    def __init__(self, config: TSCDConfig, given: LoopArguments, distiller: Distiller, device: torch.device):
        context = ray.train.get_context()
        self.config, self.board, self.distiller, self.device = config, given.board, distiller, device
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.folder = storage.run_folder(config.run)
        position = self._resume()
        self.stream = LatentStream(
            config.data, config.teacher, given.urls, config.optim.batch // self.world, self.rank, self.world,
            config.run.seed, position, given.reject_log,
        )  # fmt: skip
        self.position = position
        self.loggers = Loggers(config) if self.rank == 0 else None
        self.clock = Stopwatch(config)
        self.last_checkpoint = "none yet"

    def _resume(self) -> StreamPosition:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return StreamPosition()
        with checkpoint.as_directory() as folder:
            load_checkpoint(Path(folder), self.distiller)
            saved = load_position(Path(folder), self.rank, self.world)
        return StreamPosition() if saved is None else StreamPosition.from_dict(saved)

    def run(self) -> None:
        """Step until no stage is left."""
        try:
            for batch in self._batches():
                metrics = self.distiller.step(batch)
                self._check(metrics)
                self._after_step(metrics)
                if self.distiller.finished:
                    break
        finally:
            self.stream.close()
            if self.loggers is not None:
                self.loggers.close()

    def _batches(self) -> Iterator[Batch]:
        if self.distiller.finished:
            return
        while True:
            self.clock.wait_begins()
            rows, self.position = next(self.stream)
            self.clock.wait_ends()
            parts = [
                rows[name].to(self.device, torch.float32) if name in rows else None
                for name in ("prompt_embeds", "pooled", "time_ids")
            ]
            yield Batch(rows["latents"].to(self.device, torch.float32), Conditioning(*parts))

    def _check(self, metrics: dict[str, torch.Tensor]) -> None:
        limit, progress = self.config.run.max_bad_steps, self.distiller.progress
        if progress.bad_in_a_row >= limit:
            raise RuntimeError(
                f"{limit} steps in a row had NaN or inf (run.max_bad_steps={limit}), the last at stage {progress.stage + 1} "
                f"step {progress.step}; the last good checkpoint is {self.last_checkpoint}: lower optim.lr or raise optim.warmup"
            )

    def _after_step(self, metrics: dict[str, torch.Tensor]) -> None:
        progress, run = self.distiller.progress, self.config.run
        self.clock.step()
        ends = progress.step == self.distiller.steps
        if self.rank == 0 and (ends or progress.step % run.log_every == 0):
            self._log(metrics)
        if ends or (run.grids_every and progress.step % run.grids_every == 0):
            self._grid()
        if ends:
            self._export()
            self.distiller.next_stage()
        if ends or progress.step % run.checkpoint_every == 0:
            self._report(metrics)

    def _log(self, metrics: dict[str, torch.Tensor]) -> None:
        progress, c = self.distiller.progress, self.config
        values = {name: float(value) for name, value in metrics.items()}
        rates = self.clock.rates(progress.stage, progress.step)
        k = c.distill.k_list[progress.stage]
        self.loggers.scalars(
            self.clock.global_step(progress.stage, progress.step),
            values | rates | {"skipped": progress.skipped, "k": k},
        )
        losses = {name: value for name, value in values.items() if name != "grad_norm"}
        snapshot = Snapshot(
            progress.stage, c.stages, k, progress.step, self.distiller.steps, losses,
            rates["images_per_s"], rates["data_wait"], rates["seconds_left"],
        )  # fmt: skip
        self.board.post.remote(snapshot)

    def _grid(self) -> None:
        """Teacher at 25 steps over student at 8, 4, 2, 1, in the logs."""
        if self.rank != 0:
            return
        self.clock.pause()
        roles, prompts = self.distiller.roles, self.config.run.prompts
        encoders = load_encoders(self.config.teacher, device=str(self.device))
        embeds = encoders.encode_prompts(list(prompts))
        shape = (roles.unet.config.in_channels, *[roles.unet.config.sample_size] * 2)
        x_T = samples.start_noise(self.config.run.seed, prompts, shape).to(self.device)
        cond = Conditioning(
            embeds.prompt_embeds,
            embeds.pooled,
            square_time_ids(self.config, len(prompts), self.device) if encoders.is_sdxl else None,
        )
        omega = (self.config.distill.omega_min + self.config.distill.omega_max) / 2
        rows = [samples.teacher_samples(roles, x_T, cond, self.distiller.null, 25, omega)]
        rows += [samples.student_samples(roles, STUDENT, x_T, cond, steps) for steps in (8, 4, 2, 1)]
        picture = samples.tile([encoders.decode(row).cpu() for row in rows])
        progress = self.distiller.progress
        self.loggers.picture(
            self.clock.global_step(progress.stage, progress.step), "samples/teacher25_student8421", picture
        )
        self.clock.go_on()

    def _export(self) -> None:
        """The stage's LoRA (or UNet) is a product: usable at k steps."""
        if self.rank != 0:
            return
        c, roles = self.config, self.distiller.roles
        k = c.distill.k_list[self.distiller.progress.stage]
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            if c.full_unet:
                with roles.playing(STUDENT) as unet:
                    save_unet(unet, made / f"unet-k{k}")
                storage.put(made / f"unet-k{k}", f"{self.folder}/unet-k{k}")
                return
            tensors = {name: p.detach().cpu() for name, p in roles.named_tensors(STUDENT).items()}
            for layout, save in (("", save_diffusers_lora), ("-kohya", save_kohya_lora)):
                path = made / f"tscd-k{k}{layout}.safetensors"
                save(tensors, path, lora_metadata(c, k))
                storage.put(path, f"{self.folder}/lora/{path.name}")

    def _report(self, metrics: dict[str, torch.Tensor]) -> None:
        self.clock.pause()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if self.rank == 0:
                save_checkpoint(folder, self.distiller)
            save_position(folder, self.rank, self.world, self.position.to_dict())
            values = {name: float(value) for name, value in metrics.items()}
            progress = asdict(self.distiller.progress)
            ray.train.report(
                values | progress | self.clock.totals(), checkpoint=ray.train.Checkpoint.from_directory(temporary)
            )
        self.last_checkpoint = f"stage {progress['stage'] + 1} step {progress['step']} in {self.folder}"
        self.clock.go_on()


def lora_metadata(config: TSCDConfig, k: int) -> LoRAMetadata:
    """What the LoRA of stage `k` says of itself: k steps first, then what else it can."""
    info = read_base(config.teacher)
    steps = (k, *(s for s in (1, 2, 4, 8) if s != k))
    return LoRAMetadata(
        base_model=info.path.name, family=info.family, k=k, steps=steps, scheduler="TCDScheduler", eta=0.0,
        rank=config.lora.rank, alpha=config.lora.effective_alpha, recipe=config.run.name, extra={},
    )  # fmt: skip


def square_time_ids(config: TSCDConfig, batch: int, device: torch.device | str) -> torch.Tensor:
    """SDXL's size conditioning of an uncropped square picture at the run's resolution, (B, 6)."""
    side = float(config.data.resolution)
    return torch.tensor([[side, side, 0, 0, side, side]], device=device).repeat(batch, 1)


class Stopwatch:
    """Rates over the latest steps, and the share of the time that went to waiting for data.

    Checkpoints and sample grids are pauses: they are in nobody's rate. The first steps of a process (compilation, the
    stream's start) are left out of the waiting share that is reported.
    """

    WARMUP = 5

    def __init__(self, config: TSCDConfig):
        self.config, self.steps_done, self.waited, self.total = config, 0, 0.0, 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=50)
        self.wait = 0.0
        self.begun = time.perf_counter()

    def wait_begins(self) -> None:
        """The loop asks for a batch."""
        self._asked = time.perf_counter()

    def wait_ends(self) -> None:
        """It has one."""
        self.wait = time.perf_counter() - self._asked

    def step(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        elapsed, self.begun = now - self.begun, now
        self.steps_done += 1
        if self.steps_done > self.WARMUP:
            self.recent.append((elapsed, self.wait))
            self.total, self.waited = self.total + elapsed, self.waited + self.wait

    def pause(self) -> None:
        """What follows is not training."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Training goes on."""
        self.begun += time.perf_counter() - self._paused

    def global_step(self, stage: int, step: int) -> int:
        """Steps since the run's beginning, over all stages."""
        return sum(self.config.distill.steps_list[:stage]) + step

    def rates(self, stage: int, step: int) -> dict[str, float]:
        """images_per_s, data_wait (share) and seconds_left."""
        seconds = sum(s for s, _ in self.recent) / len(self.recent) if self.recent else 0.0
        left = sum(self.config.distill.steps_list) - self.global_step(stage, step)
        wait = sum(w for _, w in self.recent)
        return {
            "images_per_s": self.config.optim.batch / seconds if seconds else 0.0,
            "data_wait": wait / (seconds * len(self.recent)) if seconds else 0.0,
            "seconds_left": seconds * left,
        }

    def totals(self) -> dict[str, float]:
        """Over this process's life."""
        return {"data_wait_share": self.waited / self.total if self.total else 0.0, "train_seconds": self.total}
