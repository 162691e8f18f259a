"""Ray Train around a `PreferenceTraining`: workers, checkpoints, logs, held-out accuracy."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from torch import Tensor

from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.preference import PreferenceConfig
from hypersd_ray.data.preferences import PairStream, Position, held_out_pairs, open_batch
from hypersd_ray.models.rewards.image_reward import load_image_reward, save_image_reward
from hypersd_ray.trainer import keeping, storage
from hypersd_ray.trainer.logs import Loggers
from hypersd_ray.trainer.notices import Notice, Notices
from hypersd_ray.trainer.progress import Snapshot, shown
from hypersd_ray.trainer.room import check_workers
from hypersd_ray.trainer.run import connect, run_trainer
from hypersd_ray.trainer.sole import sole
from hypersd_ray.trainer.stopping import Trainer
from hypersd_ray.trainer.stopwatch import Stopwatch
from hypersd_ray.trainer.worker import device_of_worker, failures_told
from hypersd_ray.training.checkpoint import save_checkpoint, save_position
from hypersd_ray.training.preference import PreferenceTraining, pairwise_accuracy

HELD_OUT = "held_out.json"
"""What a finished run measured on the held-out pairs."""
SAME_RUN = ("init", "freeze", "pairs", "steps")
"""Fields that a resumed run must share with the run it resumes."""


@dataclass(frozen=True)
class Fitted:
    """A finished run: its folder, the model in it, and its accuracy on the held-out pairs."""

    folder: str
    model: str
    metrics: dict[str, Any]


def fit(config: PreferenceConfig) -> Fitted:
    """Run `config` from its beginning or from where the run of that name stands.

    Raises:
        ConfigError, ValueError: something a user can mend, before anything started.
        RunError: the run started and cannot go on; Stopped: it was told to stop.
    """
    run = config.run.model_copy(update={"out": storage.out_folder(config.run)})
    config = config.located(storage.absolute).model_copy(update={"run": run})  # workers run in other directories
    if not storage.exists(config.init):
        raise ConfigError(f"init={config.init} does not exist: name ImageReward's checkpoint, or a folder of its class")
    folder = storage.run_folder(run)
    _check_same(config, folder)
    held_out_pairs(config.pairs, 1)
    load_image_reward(config.init, config.tokenizer or None)  # once here, where what is wrong with it is one line
    connect()
    check_workers(run)
    with sole(run, folder) as board, shown(board):
        keeping.write_config(folder, config)
        run_trainer(_trainer(config, board), run, folder, board)
    return Fitted(folder, f"{folder}/model", json.loads(storage.read_text(f"{folder}/{HELD_OUT}")))


def _trainer(config: PreferenceConfig, board: ray.actor.ActorHandle) -> Trainer:
    run = config.run
    gpus = {"GPU": run.gpus_per_worker} if run.gpus_per_worker else {}
    return Trainer(
        train_loop,
        train_loop_config={"config": config.model_dump(), "board": board},
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=bool(gpus), resources_per_worker={"CPU": run.cpus_per_worker} | gpus
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.out,
            failure_config=FailureConfig(max_failures=run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.keep_checkpoints),
        ),
    )


def _check_same(config: PreferenceConfig, folder: str) -> None:
    path = f"{folder}/{keeping.CONFIG}"
    if not storage.exists(path):
        return
    saved = PreferenceConfig.model_validate(yaml.safe_load(storage.read_text(path)))
    for field in SAME_RUN:
        if getattr(saved, field) != getattr(config, field):
            raise ConfigError(f"{field} differs from the run that is in {folder}: set run.name to start another run")


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `arguments` are a `PreferenceConfig`'s fields and the board."""
    board = arguments["board"]
    if ray.get(board.stop_reason.remote()) is not None:
        return
    with failures_told(board):
        config, device = PreferenceConfig.model_validate(arguments["config"]), device_of_worker()
        model = load_image_reward(config.init, config.tokenizer or None).to(device)
        rank = ray.train.get_context().get_world_rank()
        Fitting(config, PreferenceTraining(config, model, rank), device, board).run()


class Fitting:
    """One worker's share of a run."""

    def __init__(
        self, config: PreferenceConfig, training: PreferenceTraining, device: torch.device, board: ray.actor.ActorHandle
    ):
        context = ray.train.get_context()
        self.config, self.training, self.device, self.board = config, training, device, board
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.folder = storage.run_folder(config.run)
        self.before: float | None = None
        """The held-out accuracy before the first step; of rank 0."""
        position = self._resume()
        self.notices = Notices(board, self.rank, device)
        self.stream = PairStream(
            config.pairs, config.optim.batch // self.world, self.rank, self.world, config.run.seed, position
        )
        self.clock = Stopwatch(config, self.world)
        progress = training.progress
        steps_done = self.clock.global_step(progress.stage, progress.step)
        self.loggers = Loggers(config, steps_done) if self.rank == 0 else None
        self.measured: dict[str, float] = {}

    def _resume(self) -> Position:
        tell = lambda line: self.board.tell.remote(line)
        patience_s = self.config.run.storage_patience_s
        found = keeping.resume(self.folder, self.training, self.rank, self.world, self.device, tell, patience_s)
        self.last_checkpoint, self.damaged = found.path or "none yet", found.damaged
        if not found.positions:
            return Position()
        saved = found.positions[0]
        self.before = saved["before"]
        # With another number of workers the epoch begins anew.
        return Position(saved["epoch"]) if found.dealt_again else Position(saved["epoch"], saved["batch"])

    def run(self) -> None:
        """Step to the end, or until told to stop."""
        if self.before is None and self.training.progress.step == 0 and self.rank == 0:
            self.before = float(self._hits().mean())
        try:
            while not self.training.finished:
                self.clock.wait_begins()
                batch, position = next(self.stream)
                self.clock.wait_ends()
                metrics = {k: float(v) for k, v in self.training.step(batch.to(self.device)).items()}
                if self._after_step(metrics, position):
                    break
        finally:
            if self.loggers is not None:
                self.loggers.close()

    def _after_step(self, metrics: dict[str, float], position: Position) -> bool:
        """Measure, log and save as is due; -> whether the job is to stop here."""
        run, progress = self.config.run, self.training.progress
        step, ends = progress.step, progress.step == self.config.steps
        self.clock.step()
        notice = self.notices()
        if progress.bad_in_a_row >= run.max_bad_steps:
            raise RunError(
                f"{run.max_bad_steps} steps in a row had NaN or inf (run.max_bad_steps={run.max_bad_steps}), the last step "
                f"{step}; the last good checkpoint is {self.last_checkpoint}: lower optim.lr or raise optim.warmup"
            )
        if ends or step % self.config.eval_every == 0:
            self._measure()
        if ends or step % run.log_every == 0:
            self._log(step, metrics)
        if ends:
            self._save_model()
            self.training.next_stage()
        if ends or notice >= Notice.SAVE or step % run.checkpoint_every == 0:
            self._report(step, metrics, position)
        if notice != Notice.STOP or self.training.finished:
            return False
        ray.get(self.board.leave.remote(self.last_checkpoint))
        return True

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.loggers is None:
            return
        rates = self.clock.rates(0, step)
        rates["images_per_s"] *= 2  # of a pair
        self.loggers.scalars(step, metrics | self.measured | rates)
        losses = {name: metrics[name] for name in ("loss", "accuracy")}
        snapshot = Snapshot(
            0, 1, None, step, self.config.steps, losses,
            rates["images_per_s"], rates["data_wait"], rates["seconds_left"],
        )  # fmt: skip
        self.board.post.remote(snapshot)

    def _measure(self) -> None:
        """Accuracy on the held-out pairs, by rank 0 alone."""
        if self.rank != 0:
            return
        self.clock.pause()
        hits = self._hits()
        error = float(hits.std() / len(hits) ** 0.5) if len(hits) > 1 else 0.0
        self.measured = {"held_out_accuracy": float(hits.mean()), "held_out_error": error, "held_out_pairs": len(hits)}
        if self.before is not None:
            self.measured["held_out_before"] = self.before
        self.clock.go_on()

    def _hits(self) -> Tensor:
        """Of each held-out pair whether the preferred picture scores higher."""
        pairs = held_out_pairs(self.config.pairs, self.config.eval_pairs)
        resolution = self.config.pairs.resolution
        batches = (open_batch(pairs[i : i + 32], resolution).to(self.device) for i in range(0, len(pairs), 32))
        return pairwise_accuracy(self.training.model, batches)

    def _save_model(self) -> None:
        if self.rank != 0:
            return
        with tempfile.TemporaryDirectory() as temporary:
            made, target = Path(temporary) / "model", f"{self.folder}/model"
            save_image_reward(self.training.model, made)
            put = functools.partial(storage.put, made, target)
            storage.patiently(put, target, self.config.run.storage_patience_s)
        path, text = f"{self.folder}/{HELD_OUT}", json.dumps(self.measured)
        write = functools.partial(storage.write_text, path, text)
        storage.patiently(write, path, self.config.run.storage_patience_s)

    def _report(self, step: int, metrics: dict[str, float], position: Position) -> None:
        self.clock.pause()
        run, name = self.config.run, keeping.name_of(step, self.damaged)

        def save(folder: Path) -> None:
            save_checkpoint(folder, self.training, self.rank, self.world)
            save_position(folder, self.rank, self.world, asdict(position) | {"before": self.before})

        values = metrics | self.measured
        self.last_checkpoint = keeping.report(self.folder, name, values, save, run.storage_patience_s)
        if self.loggers is not None:
            self.loggers.flush()
            keeping.prune(self.folder, run.keep_checkpoints)
        self.clock.go_on()
