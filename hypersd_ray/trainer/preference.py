"""Ray Train around a `PreferenceTraining`: workers, checkpoints, logs, held-out accuracy."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import yaml
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from torch import Tensor

from hypersd_ray.config.base import ConfigError, RunError
from hypersd_ray.config.preference import PreferenceConfig
from hypersd_ray.data.preferences import PairStream, Position, held_out_pairs, open_batch
from hypersd_ray.models.rewards.image_reward import load_image_reward, save_image_reward
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.logs import Loggers
from hypersd_ray.trainer.progress import new_board
from hypersd_ray.trainer.room import check_workers
from hypersd_ray.trainer.run import connect
from hypersd_ray.training.checkpoint import load_checkpoint, save_checkpoint
from hypersd_ray.training.preference import PreferenceTraining, pairwise_accuracy

POSITION = "position.json"
SAME_RUN = ("init", "freeze", "pairs", "steps")
"""Fields that a resumed run must share with the run it resumes."""


@dataclass(frozen=True)
class Fitted:
    """A finished run: its folder, the model in it, and the last report of rank 0 (accuracy, pairs, ...)."""

    folder: str
    model: str
    metrics: dict[str, Any]


def fit(config: PreferenceConfig) -> Fitted:
    """Run `config` from its beginning or from where the run of that name stands.

    Raises:
        ConfigError, ValueError: something a user can mend, before anything started.
        RunError: the run started and cannot go on.
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
    storage.write_text(f"{folder}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    board = new_board()
    try:
        result = _trainer(config, board).fit()
        failed: TrainingFailedError | None = None
    except TrainingFailedError as error:
        failed = error
    reason = ray.get(board.stop_reason.remote())
    ray.kill(board)
    if reason is not None:
        raise reason
    if failed is not None:
        print(failed, file=sys.stderr)
        failures = f"workers failed more often than run.max_failures={run.max_failures} allows"
        raise RunError(f"run {run.name}: {failures}; the same command goes on from {folder}") from failed
    return Fitted(folder, f"{folder}/model", result.metrics or {})


def _trainer(config: PreferenceConfig, board: ray.actor.ActorHandle) -> TorchTrainer:
    run = config.run
    gpus = {"GPU": run.gpus_per_worker} if run.gpus_per_worker else {}
    return TorchTrainer(
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
    path = f"{folder}/config.yaml"
    if not storage.exists(path):
        return
    saved = PreferenceConfig.model_validate(yaml.safe_load(storage.read_text(path)))
    for field in SAME_RUN:
        if getattr(saved, field) != getattr(config, field):
            raise ConfigError(f"{field} differs from the run that is in {folder}: set run.name to start another run")


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `arguments` are a `PreferenceConfig`'s and the board, where what would end the
    run the same way every time is said (as in loop.train_loop)."""
    board = arguments["board"]
    if ray.get(board.stop_reason.remote()) is not None:
        return
    try:
        _train(PreferenceConfig.model_validate(arguments["config"]))
    except RunError as error:
        ray.get(board.stop.remote(error))  # on all ranks at once
    except ValueError as error:
        traceback.print_exc()  # into the worker's log
        ray.get(board.stop.remote(RunError(" ".join(str(error).split()))))
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks may be waiting for this one


def _train(config: PreferenceConfig) -> None:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    model = load_image_reward(config.init, config.tokenizer or None).to(device)
    Fitting(config, PreferenceTraining(config, model, context.get_world_rank()), device).run()


class Fitting:
    """One worker's share of a run."""

    def __init__(self, config: PreferenceConfig, training: PreferenceTraining, device: torch.device):
        context = ray.train.get_context()
        self.config, self.training, self.device = config, training, device
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.folder = storage.run_folder(config.run)
        position = self._resume()
        self.stream = PairStream(
            config.pairs, config.optim.batch // self.world, self.rank, self.world, config.run.seed, position
        )
        self.loggers = Loggers(config) if self.rank == 0 else None
        self.measured: dict[str, float] = {}

    def _resume(self) -> Position:
        self.before: float | None = None
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Position()
        with checkpoint.as_directory() as folder:
            load_checkpoint(Path(folder), self.training)
            saved = json.loads((Path(folder) / POSITION).read_text())
        self.before = saved.get("before")
        # every rank has done as many batches; with another number of workers the epoch begins anew
        return Position(**saved["position"]) if saved["world"] == self.world else Position(saved["position"]["epoch"])

    def run(self) -> None:
        """Step to the end."""
        run = self.config.run
        if self.before is None and self.training.progress.step == 0 and self.rank == 0:
            self.before = float(self._hits().mean())
        try:
            while not self.training.finished:
                batch, position = next(self.stream)
                metrics = {k: float(v) for k, v in self.training.step(batch.to(self.device)).items()}
                step = self.training.progress.step
                ends = step == self.config.steps
                if self.training.progress.bad_in_a_row >= run.max_bad_steps:
                    raise RunError(
                        f"{run.max_bad_steps} steps in a row had NaN or inf (run.max_bad_steps={run.max_bad_steps}), the last "
                        f"step {step}: lower optim.lr or raise optim.warmup"
                    )
                if ends or step % self.config.eval_every == 0:
                    self._measure()
                if self.loggers is not None and (ends or step % run.log_every == 0):
                    self.loggers.scalars(step, metrics | self.measured)
                if ends:
                    self._save_model()
                    self.training.next_stage()
                if ends or step % run.checkpoint_every == 0:
                    self._report(metrics, position)
        finally:
            if self.loggers is not None:
                self.loggers.close()

    def _measure(self) -> None:
        """Accuracy on held-out pairs; every rank takes a part, rank 0's suffices for the log when there is one."""
        if self.rank != 0:
            return
        hits = self._hits()
        error = float(hits.std() / len(hits) ** 0.5) if len(hits) > 1 else 0.0
        self.measured = {"held_out_accuracy": float(hits.mean()), "held_out_error": error, "held_out_pairs": len(hits)}
        if self.before is not None:
            self.measured["held_out_before"] = self.before

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
            save_image_reward(self.training.model, Path(temporary) / "model")
            storage.put(Path(temporary) / "model", f"{self.folder}/model")

    def _report(self, metrics: dict[str, float], position: Position) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_checkpoint(folder, self.training, self.rank)
            if self.rank == 0:
                where = {"position": asdict(position), "world": self.world, "before": self.before}
                (folder / POSITION).write_text(json.dumps(where))
            ray.train.report(metrics | self.measured, checkpoint=ray.train.Checkpoint.from_directory(temporary))
