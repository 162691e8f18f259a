"""The training loop of one Ray Train worker: build, resume, step, report."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

from hypersd_ray.actors.placement import Handles
from hypersd_ray.config.base import RunError
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.run import rows_each
from hypersd_ray.data.plan import StreamPosition, deal_again
from hypersd_ray.data.stream import LatentStream
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.conditioning import Conditioning, square_time_ids
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.trainer import keeping, storage
from hypersd_ray.trainer.kinds import KINDS, AnyConfig
from hypersd_ray.trainer.kinds.base import Place
from hypersd_ray.trainer.logs import Loggers
from hypersd_ray.trainer.notices import Notice, Notices
from hypersd_ray.trainer.progress import Snapshot
from hypersd_ray.trainer.stopwatch import Stopwatch
from hypersd_ray.trainer.worker import device_of_worker, failures_told
from hypersd_ray.training import samples
from hypersd_ray.training.checkpoint import save_checkpoint, save_position
from hypersd_ray.training.onestep import OdePairs
from hypersd_ray.training.protocol import Training
from hypersd_ray.training.quality import Yardstick, objective
from hypersd_ray.training.tscd import Batch

QUIET = {"grad_norm", "dropped", "watch", "hacking", "saturation", "diversity", "reward_seconds", "annotated"}
"""What is logged and is not in the progress line."""
MOVE_S = 10.0
"""Seconds in which Ray Train ends a group after its last checkpoint; a step more would be made again by the next one."""


@dataclass(frozen=True)
class PairSource:
    """Pairs to regress on: the latents are the ODE's end points, their noise a function of `seed` and the row's key."""

    urls: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class LoopArguments:
    """What the driver settles before workers start. `config` is that of `kind` as a dict; `urls` what is streamed."""

    kind: str
    config: dict[str, Any]
    urls: tuple[str, ...]
    board: ray.actor.ActorHandle
    reject_log: ray.actor.ActorHandle | None = None
    pairs: PairSource | None = None
    evaluators: Handles | None = None
    runs_per_node: int = 1


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `arguments` are the fields of `LoopArguments`."""
    given = LoopArguments(**arguments)
    if ray.get(given.board.stop_reason.remote()) is not None:
        return
    with failures_told(given.board):
        _train(given)


def _train(given: LoopArguments) -> None:
    kind = KINDS[given.kind]
    config = kind.config.model_validate(given.config)
    device = device_of_worker(given.runs_per_node)
    rank = ray.train.get_context().get_world_rank()
    place = Place(device, rank, given.evaluators, lambda line: given.board.tell.remote(line))
    Worker(config, given, kind.build(config, place), device).run()


class Worker:
    """One worker's share of a run."""

    def __init__(self, config: AnyConfig, given: LoopArguments, training: Training, device: torch.device):
        context = ray.train.get_context()
        self.config, self.board, self.training, self.device = config, given.board, training, device
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.folder = storage.run_folder(config.run)
        self.yardstick: Yardstick | None = None
        self.kind = KINDS[given.kind]
        self.position, self.pairs_position = self._resume(given)
        self.notices = Notices(self.board, self.rank, device)
        rows = rows_each(config.optim.batch, self.world, config.optim.accumulation)
        self.stream = LatentStream(
            config.data, config.teacher, given.urls, rows, self.rank, self.world, config.run.seed, self.position,
            given.reject_log,
        )  # fmt: skip
        self.pairs = None if given.pairs is None else self._pair_stream(given.pairs)
        self.clock = Stopwatch(config, self.world)
        progress = training.progress
        self.loggers = (
            Loggers(config, self.clock.global_step(progress.stage, progress.step)) if self.rank == 0 else None
        )

    def _resume(self, given: LoopArguments) -> tuple[StreamPosition, StreamPosition]:
        """Of the images and of the pairs."""
        tell = lambda line: self.board.tell.remote(line)
        patience_s = self.config.run.storage_patience_s
        found = keeping.resume(self.folder, self.training, self.rank, self.world, self.device, tell, patience_s)
        self.last_checkpoint, self.damaged = found.path or "none yet", found.damaged
        pairs = () if given.pairs is None else given.pairs.urls
        return self._position(found, "images", given.urls), self._position(found, "pairs", pairs)

    def _position(self, found: keeping.Found, name: str, urls: Sequence[str]) -> StreamPosition:
        """Of one stream; where the number of workers was another, what they had left is dealt anew."""
        positions = [StreamPosition.from_dict(one.get(name, {})) for one in found.positions]
        if not positions or not urls:
            return StreamPosition()
        if not found.dealt_again:
            return positions[0]
        per_window = self.config.data.shards_per_window
        return deal_again(positions, urls, self.config.run.seed, per_window, self.rank, self.world)

    def _pair_stream(self, source: PairSource) -> LatentStream:
        assert isinstance(self.config, OneStepConfig)
        self.pair_seed = source.seed
        config = self.config.data.model_copy(update={"format": "latents"})
        rows = rows_each(self.config.regression.batch, self.world, self.config.optim.accumulation)
        return LatentStream(
            config, self.config.teacher, source.urls, rows, self.rank, self.world, self.config.run.seed,
            self.pairs_position,
        )  # fmt: skip

    def run(self) -> None:
        """Step until no stage is left."""
        if self.training.finished:
            ray.get(self.board.find_finished.remote())
        try:
            for batches in self._batches():
                metrics = self.training.step(*batches)
                self._check(metrics)
                if self._after_step(metrics) or self.training.finished:
                    break
        finally:
            self.stream.close()
            if self.pairs is not None:
                self.pairs.close()
            if self.loggers is not None:
                self.loggers.close()

    def _batches(self) -> Iterator[tuple]:
        """What a step takes: a batch of images, and where the run has pairs a batch of them."""
        if self.training.finished:
            return
        while True:
            self.clock.wait_begins()
            rows, self.position = next(self.stream)
            batches: tuple = (Batch.from_rows(rows, self.device),)
            if self.pairs is not None:
                rows, self.pairs_position = next(self.pairs)
                ends = Batch.from_rows(rows, self.device)
                noise = samples.start_noise(self.pair_seed, rows["key"], tuple(ends.x0.shape[1:]))
                batches += (OdePairs(noise.to(self.device), ends.x0, ends.cond),)
            self.clock.wait_ends()
            yield batches

    def _check(self, metrics: dict[str, torch.Tensor]) -> None:
        limit, progress = self.config.run.max_bad_steps, self.training.progress
        if progress.bad_in_a_row >= limit:
            raise RunError(
                f"{limit} steps in a row had NaN or inf (run.max_bad_steps={limit}), the last at stage {progress.stage + 1} "
                f"step {progress.step}; the last good checkpoint is {self.last_checkpoint}: lower optim.lr or raise optim.warmup"
            )

    def _after_step(self, metrics: dict[str, torch.Tensor]) -> bool:
        """Log, draw, export, measure and save as is due; -> whether the job is to stop here."""
        progress, run = self.training.progress, self.config.run
        self.clock.step()
        notice = self.notices()
        ends = progress.step == self.training.steps
        if ends or progress.step % run.log_every == 0:
            self._log(metrics)
        if ends or (run.grids_every and progress.step % run.grids_every == 0):
            self._grid()
        measured: dict[str, float] = {}
        if ends:
            self._export()
            measured = self._measure()
            self.training.next_stage()
        if ends or notice >= Notice.SAVE or progress.step % run.checkpoint_every == 0:
            self._report(metrics, measured)
        if notice == Notice.MOVE:
            time.sleep(MOVE_S)
        if notice != Notice.STOP or self.training.finished:
            return False
        ray.get(self.board.leave.remote(self.last_checkpoint))
        return True

    def _log(self, metrics: dict[str, torch.Tensor]) -> None:
        if self.loggers is None:  # not rank 0
            return
        progress, c = self.training.progress, self.config
        values = {name: float(value) for name, value in metrics.items()}
        rates = self.clock.rates(progress.stage, progress.step)
        k = c.stage_k[progress.stage]
        self.loggers.scalars(
            self.clock.global_step(progress.stage, progress.step),
            values | rates | {"skipped": progress.skipped} | ({} if k is None else {"k": k}),
        )
        losses = {name: value for name, value in values.items() if name.split("/")[0] not in QUIET}
        snapshot = Snapshot(
            progress.stage, c.stages, k, progress.step, self.training.steps, losses,
            rates["images_per_s"], rates["data_wait"], rates["seconds_left"],
        )  # fmt: skip
        self.board.post.remote(snapshot)

    def _grid(self) -> None:
        """Samples of the run's prompts, in the logs; rank 0's alone, but where the network needs all ranks."""
        if self.loggers is None and not self.training.roles.together:
            return
        self.clock.pause()
        prompts = self.config.run.prompts
        encoders = load_encoders(self.config.teacher, device=str(self.device))
        embeds = encoders.encode_prompts(list(prompts))
        shape = latent_shape(self.config)
        x_T = samples.start_noise(self.config.run.seed, prompts, shape).to(self.device)
        cond = Conditioning(
            embeds.prompt_embeds,
            embeds.pooled,
            square_time_ids(self.config.data.resolution, len(prompts), self.device) if encoders.is_sdxl else None,
        )
        name, rows = self.kind.grid(self.config, self.training, x_T, cond)
        if self.loggers is not None:
            picture = samples.tile([encoders.decode(row).cpu() for row in rows])
            progress = self.training.progress
            self.loggers.picture(self.clock.global_step(progress.stage, progress.step), f"samples/{name}", picture)
        self.clock.go_on()

    def _export(self) -> None:
        """What a stage leaves is a product: usable as it is."""
        self.clock.pause()
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            self.kind.export(self.config, self.training, self.training.progress.stage, made if self.rank == 0 else None)
            for path in sorted(p for p in made.rglob("*") if p.is_file()):
                target = f"{self.folder}/{path.relative_to(made).as_posix()}"
                put = functools.partial(storage.put, path, target)
                storage.patiently(put, target, self.config.run.storage_patience_s)
        self.clock.go_on()

    def _measure(self) -> dict[str, float]:
        """The stage's quality, where the run measures it: into the logs and the report of its end."""
        measure = self.config.measure
        if measure is None or not measure.prompts or (self.loggers is None and not self.training.roles.together):
            return {}
        self.clock.pause()
        if self.yardstick is None:
            encoders = load_encoders(self.config.teacher, device=str(self.device))
            time_ids = square_time_ids(self.config.data.resolution, 1, self.device) if encoders.is_sdxl else None
            teacher, shape = Path(self.config.teacher), latent_shape(self.config)
            self.yardstick = Yardstick(measure, self.training.roles, encoders, teacher, shape, time_ids)
        known = {how.steps: how for how in self.kind.samplings(self.config)}
        eta = next(iter(known.values())).eta
        quality = self.yardstick({n: known.get(n, samples.Sampling(n, eta=eta)) for n in measure.steps})
        if self.loggers is None:  # the network needed this rank too
            self.clock.go_on()
            return {}
        values = quality.means() | {"objective": objective(quality, measure.clip_weight)}
        progress = self.training.progress
        step = self.clock.global_step(progress.stage, progress.step)
        self.loggers.scalars(step, values)
        record = {"stage": progress.stage + 1, "step": step, "objective": values["objective"]} | asdict(quality)
        keeping.append_quality(self.folder, record, self.config.run.storage_patience_s)
        self.clock.go_on()
        return values

    def _report(self, metrics: dict[str, torch.Tensor], measured: dict[str, float]) -> None:
        self.clock.pause()
        run, progress = self.config.run, asdict(self.training.progress)
        # A name of ours, so that it can be told; one left over from a killed run is written anew.
        name = keeping.name_of(self.clock.global_step(progress["stage"], progress["step"]), self.damaged)
        values = {key: float(value) for key, value in metrics.items()} | measured | progress | self.clock.totals()
        done = functools.partial(self.board.saved.remote, self.rank, self.world)
        self.last_checkpoint = keeping.report(self.folder, name, values, self._save, run.storage_patience_s, done)
        if self.loggers is not None:
            self.loggers.flush()
            keeping.prune(self.folder, run.keep_checkpoints)
        self.clock.go_on()

    def _save(self, folder: Path) -> None:
        save_checkpoint(folder, self.training, self.rank, self.world)
        self.training.roles.save_own(folder)
        positions = {"images": self.position.to_dict(), "pairs": self.pairs_position.to_dict()}
        save_position(folder, self.rank, self.world, positions)


def latent_shape(config: AnyConfig) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents at the run's resolution, which need not be the one that the base was made for."""
    info = read_base(config.teacher)
    side = config.data.resolution // info.latent_factor
    return info.latent_channels, side, side
